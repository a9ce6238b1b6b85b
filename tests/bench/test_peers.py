"""The comparison with other engines: what is read, dropped, resumed and shown; no peer is installed here."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.peers import chart, engines, processes, report, runner, synthetic
from bench.peers.__main__ import main
from bench.peers.cases import BASE, CODER, IK, LLAMA, TRANSFORMERS, Case, chosen
from bench.peers.checkpoints import Checkpoints
from bench.peers.engines import OURS, Command, Engines, Sample
from bench.peers.runner import Log, Record
from bench.peers.setup import NotAvailable, Setup, last_line

from kvern.checkpoint.load import load

LLAMA_BENCH = (
    '{"build_commit": "unknown", "build_number": 0, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU", '
    '"model_type": "deepseek2 ?B Q8_0", "model_size": 2038353536, "n_threads": 2, "flash_attn": -1, "n_prompt": 0, '
    '"n_gen": 128, "n_depth": 0, "avg_ns": 2257761190, "stddev_ns": 0, "avg_ts": 56.693, "stddev_ts": 0.000000, '
    '"samples_ns": [ 2257761190 ],"samples_ts": [ 56.693 ]}\n'
)
BATCHED = (
    "0.00.064.812 W llama_context: n_ctx is not divisible by n_seq_max - rounding down to 2048\n"
    '{"n_kv_max": 2048, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, '
    '"n_threads": 2, "n_threads_batch": 2, "pp": 16, "tg": 32, "pl": 8, "n_kv": 384, "t_pp": 0.825041, '
    '"speed_pp": 155.143799, "t_tg": 14.084023, "speed_tg": 18.176624, "t": 14.909064, "speed": 25.756144}\n\n'
)
DRIVER = '{"tokens_per_s": 65.6734150957938, "system": "AVX = 1 | AVX_VNNI = 0 | AVX2 = 1 | AVX512 = 0 | "}\n'
X1, X8, MEMORY = BASE[0], BASE[1], BASE[-1]

TINY = replace(
    synthetic.BASE,
    vocab_size=320,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


def test_reads_what_the_programs_print() -> None:
    assert engines.read_llama_bench(LLAMA_BENCH).value == 56.693
    assert engines.read_batched(BATCHED).value == 18.176624
    assert engines.read_driver(DRIVER).value == 65.6734150957938


@pytest.mark.parametrize("text", ["", "error: failed to load model\n", DRIVER + DRIVER])
def test_an_answer_without_one_figure_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\d lines with tokens_per_s"):
        engines.read_driver(text)


def test_reads_kverns_row_of_the_case() -> None:
    row = {"test": "decode", "tokens": 128, "tokens_per_s": 90.0, "bytes_per_token": 3e8, "gb_per_s": 27.0}
    other = {**row, "test": "prefill", "tokens": 16}
    text = json.dumps([{**other, "bandwidth_share": 0.5}, {**row, "bandwidth_share": 0.9}])
    assert engines.read_kvern(text, X1) == Sample(90.0, 3e8, 27.0, 0.9)
    with pytest.raises(ValueError, match="0 rows of decode 32"):
        engines.read_kvern(text, X8)


def test_a_round_is_dropped_for_all_when_one_engine_fell_under_half_of_its_usual() -> None:
    rates = {OURS: [100, 99, 101, 98], LLAMA: [50, 26, 24, 51], IK: [80, 81, 79, 30]}
    rounds = {at: {name: Sample(values[at]) for name, values in rates.items()} for at in range(4)}
    assert runner.disturbed(rounds) == {2, 3}
    assert set(runner.kept(rounds)) == {0, 1}


def test_of_two_samples_the_faster_is_usual() -> None:
    assert runner.disturbed({0: {OURS: Sample(10)}, 1: {OURS: Sample(4)}}) == {1}
    assert runner.disturbed({0: {OURS: Sample(10)}}) == set()


class FakeEngines(Engines):
    """Commands that print the next figure of a list, and note who was asked to run."""

    def __init__(self, folder: Path, values: dict[str, list[float]]) -> None:
        setup = Setup(folder)
        super().__init__(setup, Checkpoints(setup, "base"))
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "asked", [])

    def command(self, engine: str, case: Case) -> Command:
        if engine not in self.values:  # type: ignore[attr-defined]
            raise NotAvailable("no wheel")
        return Command((sys.executable, "-c", "pass"), lambda _: self._next(engine))

    def _next(self, engine: str) -> Sample:
        self.asked.append(engine)  # type: ignore[attr-defined]
        value: float = self.values[engine].pop(0)  # type: ignore[attr-defined]
        return Sample(value)


def run(folder: Path, values: dict[str, list[float]], log: Log, rounds: int = 2) -> list[str]:
    fake = FakeEngines(folder, values)
    runner.measure([X1], [LLAMA, IK, TRANSFORMERS], fake, log, rounds, lambda _: None)
    asked: list[str] = fake.asked  # type: ignore[attr-defined]
    return asked


def test_engines_alternate_and_slow_ones_run_once(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log.jsonl", resume=False)
    values = {OURS: [9.0, 9], LLAMA: [5.0, 5], TRANSFORMERS: [1.0, 1]}
    assert run(tmp_path, values, log) == [OURS, LLAMA, TRANSFORMERS, LLAMA, OURS]
    assert log.why("x1", IK) == "no wheel"


def test_a_dropped_round_is_run_again(tmp_path: Path) -> None:
    log = Log.open(tmp_path / "log.jsonl", resume=False)
    assert run(tmp_path, {OURS: [9.0, 9, 9], LLAMA: [5.0, 1, 5]}, log) == [OURS, LLAMA, LLAMA, OURS, OURS, LLAMA]
    assert runner.disturbed(log.rounds("x1")) == {1}


def test_a_cut_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log.open(path, resume=False)
    log.append(Record("x1", OURS, 0, Sample(9.0)))
    with path.open("a") as stream:
        stream.write('{"case": "x1", "eng')
    first = {OURS: [9.0], LLAMA: [5.0, 5], TRANSFORMERS: [1.0]}
    assert run(tmp_path, first, Log.open(path, resume=True), 1) == [LLAMA, TRANSFORMERS]
    assert run(tmp_path, first, Log.open(path, resume=True), 2) == [LLAMA, OURS]
    assert run(tmp_path, first, Log.open(path, resume=True), 2) == []


def test_an_engine_that_is_new_to_the_log_gets_rounds_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run(tmp_path, {OURS: [9.0, 9], LLAMA: [5.0, 5], TRANSFORMERS: [1.0]}, Log.open(path, resume=False))
    again = {OURS: [8.0], LLAMA: [4.0], TRANSFORMERS: [], IK: [7.0]}
    assert run(tmp_path, again, Log.open(path, resume=True)) == [OURS, LLAMA, IK]


def test_a_run_begins_anew_unless_told_to_go_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    Log.open(path, resume=False).append(Record("x1", OURS, 0, Sample(9.0)))
    assert Log.open(path, resume=False).records == []
    assert path.with_suffix(".old.jsonl").is_file()


def test_a_process_that_fails_says_why_in_its_cell(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    with pytest.raises(NotAvailable, match="no such model"):
        processes.sample(Command(argv, engines.read_driver), X1)
    assert last_line("one\rtwo\n\n") == "two"


def test_the_spinning_process_ends_with_the_sample() -> None:
    children = Path("/proc/self/task")

    def count() -> int:
        return sum(len((task / "children").read_text().split()) for task in children.iterdir())

    before = count()
    with processes._spinning(True):
        assert count() == before + 1
    assert count() == before


def test_memory_at_rest_leaves_the_runtime_apart() -> None:
    grow = "import time; data = bytearray(64 << 20); print('{\"tokens_per_s\": 1}', flush=True); time.sleep(1)"
    idle = (sys.executable, "-c", f"import time; {engines.IDLE}")
    found = processes.sample(Command((sys.executable, "-c", grow), engines.read_driver, idle=idle), MEMORY)
    assert 60 << 20 < found.value < 72 << 20
    assert found.runtime_bytes is not None
    assert 2 << 20 < found.runtime_bytes < 60 << 20


def recorded(path: Path) -> Log:
    log = Log.open(path, resume=False)
    for at, (ours, llama) in enumerate([(100, 50), (90, 50), (100, 20), (110, 50)]):
        log.append(Record("x1", OURS, at, Sample(ours, 3.3e8, 30.0, 0.8)))
        log.append(Record("x1", LLAMA, at, Sample(llama)))
    log.append(Record("x1", IK, 0, None, "no wheel"))
    log.append(Record("memory", OURS, 0, Sample(2e9, runtime_bytes=3e8)))
    log.append(Record("memory", LLAMA, 0, Sample(2.5e9)))
    return log


def test_rows_and_table_of_a_recorded_run(tmp_path: Path) -> None:
    cases, peers = [X1, MEMORY], [LLAMA, IK]
    found = report.rows(cases, peers, recorded(tmp_path / "log.jsonl"), read_gb_s=33.0)
    first, second, memory = found[:3]
    assert (first.ours, first.peer, first.ratio, first.bar, first.aim) == (100, 50, 2.0, 1.6, 1.9)
    assert [pair["kept"] for pair in first.runs] == [True, True, False, True]
    assert first.bandwidth_share == 30.0 / 33.0
    assert (second.peer, second.ratio, second.why) == (None, None, "ik_llama.cpp: no wheel")
    assert memory.ratio == 1.25
    head, lines = report.table(cases, peers, found)
    assert all(len(line) == len(head) for line in lines)
    assert lines[0][:9] == ["1 stream", "100.0", "330.0", "30.0", "91 %", "50.0", "2.00x", "1.6x", "3/4"]
    assert lines[0][9:] == ["-", "-", "1x", ""]
    notes = report.notes(cases, found)
    assert "1 stream, ik_llama.cpp: ik_llama.cpp: no wheel" in notes
    assert any("286 MiB of interpreter and torch" in note for note in notes)
    chart.draw(cases, peers, found, "recorded", tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes()[:4] == b"\x89PNG"


def test_cases_by_name() -> None:
    assert [case.name for case in chosen("base", ["x8", "x1"], full=False)] == ["x1", "x8"]
    assert {case.name for case in BASE} - {case.name for case in chosen("base", None, False)} == {"d16384", "x1-avx2"}
    assert "x16" in {case.name for case in CODER}
    with pytest.raises(ValueError, match=r"coder-0\.5b has no case x32"):
        chosen("coder-0.5b", ["x32"], full=False)


def test_every_case_of_the_issue_has_its_bars() -> None:
    bars = {case.name: {peer: bar.bar for peer, bar in case.bars.items()} for case in BASE}
    assert bars["x32"] == {LLAMA: 2.0, IK: 1.5}
    assert bars["d16384"] == {LLAMA: 3, IK: 1.1}
    assert bars["memory"] == {LLAMA: 1.0}


def test_the_synthetic_checkpoint_is_seeded_and_loads(tmp_path: Path) -> None:
    folder = synthetic.write(tmp_path / "tiny", TINY)
    weights = load(folder).state_dict()
    for name, tensor in weights.items():
        assert tensor.equal(synthetic.random_tensor(name, tensor.dtype, tuple(tensor.shape)))
    head = weights["lm_head.weight"].float()
    assert abs(head.std().item() * TINY.hidden_size**0.5 / 3 - 1) < 0.05
    json.loads((folder / "tokenizer.json").read_text())


def test_one_command_from_checkpoint_to_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.write(tmp_path / "checkpoints" / "base-fp8", TINY)
    flags = ["--work", str(tmp_path), "--engines", "none", "--cases", "x8", "--rounds", "1"]
    start = time.monotonic()
    assert main([*flags, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["case"], row["engine"], row["peer"], row["why"]) == ("x8", "", None, None)
    assert row["ours"] > 0
    assert row["bytes_per_token"] > 0
    asked = time.monotonic() - start
    assert main([*flags, "--report"]) == 0
    shown: Any = capsys.readouterr().out
    assert "8 streams" in shown
    assert time.monotonic() - start < asked + 60

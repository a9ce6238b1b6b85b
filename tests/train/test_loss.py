"""The training losses: by hand, against transformers, and what packing must never do."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tests.model.oracle import checkpoint_names, kvern_model, random_config, transformers_model, transformers_mtp
from tests.tiny import tiny_config, tiny_model
from torch.utils.checkpoint import checkpoint

from kvern.errors import ConfigError
from kvern.model import ForwardBatch, Transformer
from kvern.model.linear import Linear
from kvern.model.mtp import MTPLayer
from kvern.ops import Fp8Recipe
from kvern.train.balance import LoadBalancer, RoutingLog
from kvern.train.experts import GroupedExperts, checkpoint_state, ungrouped
from kvern.train.loss import LossOptions, MTPWeight, training_loss
from kvern.train.model import Fp8Linear, make_trainable
from kvern.train.optim import AdamW, clip_gradients, parameter_groups
from kvern.train.packed_rows import IGNORED, PackedRows
from kvern.train.weights import initialise

DOCUMENTS = [[5, 9, 3, 7, 2], [8], [1, 4, 6]]


def trainable(layers: int = 1, recipe: Fp8Recipe | None = None, std: float = 0.2) -> Transformer:
    """A tiny model with `layers` MTP layers."""
    model = tiny_model(tiny_config(num_nextn_predict_layers=layers))
    generator = torch.Generator().manual_seed(0)
    initialise(model, 0, std)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms of ones could not tell a state from its normed self
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    make_trainable(model, recipe)
    return model


def test_targets_and_shifts_stay_in_their_document() -> None:
    rows = PackedRows.of(*DOCUMENTS)
    assert rows.targets().tolist() == [9, 3, 7, 2, IGNORED, IGNORED, 4, 6, IGNORED]
    moved = rows.shifted()
    assert moved is not None
    further, kept = moved
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3, 6, 7]
    assert further.batch.tokens.tolist() == [9, 3, 7, 2, 4, 6]
    assert further.batch.places.tolist() == [0, 1, 2, 3, 0, 1]
    assert further.batch.query_starts == (0, 4, 6)
    assert further.targets().tolist() == [3, 7, 2, IGNORED, 6, IGNORED]
    assert further.rows == (0, 6)
    assert PackedRows.of([1], [2]).shifted() is None


def test_only_marked_tokens_are_predicted() -> None:
    rows = PackedRows.of([5, 9, 3, 7], [1, 4], learned=[True, False, True, True, True, False])
    assert rows.targets().tolist() == [IGNORED, 3, 7, IGNORED, IGNORED, IGNORED]
    moved = rows.shifted()
    assert moved is not None
    assert moved[0].targets().tolist() == [3, 7, IGNORED, IGNORED]


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_loss_by_hand(norm_first: bool) -> None:
    model = trainable(layers=2)
    losses = training_loss(model, PackedRows.of(*DOCUMENTS), options=LossOptions(norm_first=norm_first))

    main, mtp = torch.zeros(()), torch.zeros(())
    for document in DOCUMENTS:
        batch = ForwardBatch.of(document)
        states = model.model.states(batch, torch.float32)
        hidden = model.model.norm(states)
        main += F.cross_entropy(
            model.logits(hidden)[:-1], torch.tensor(document[1:], dtype=torch.int64), reduction="sum"
        )
        start = hidden if norm_first else states
        for depth, layer in enumerate(model.model.layers[2:], start=1):
            assert isinstance(layer, MTPLayer)
            if len(document) <= depth:
                break
            shifted = ForwardBatch.of(document[depth:])
            before = layer.states(start[: len(document) - depth], model.model.rotation(shifted), shifted)
            after = layer.shared_head.norm(before)
            wanted = torch.tensor(document[depth + 1 :], dtype=torch.int64)
            mtp += F.cross_entropy(model.logits(after)[:-1], wanted, reduction="sum") / 2
            start = after if norm_first else before
    assert losses.targets == 6
    torch.testing.assert_close(losses.main, main / 6)
    torch.testing.assert_close(losses.mtp, mtp / 6)
    torch.testing.assert_close(losses.total.detach(), (main + 0.3 * mtp) / 6)


def test_documents_of_a_row_know_nothing_of_each_other() -> None:
    gradients = []
    for last in ([1, 4, 6], [11, 12, 13]):
        model = trainable()
        rows = PackedRows.of([5, 9, 3, 7], last, learned=[True] * 4 + [False] * 3)
        torch.autograd.backward(training_loss(model, rows).total)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    assert any(gradient.any() for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_micro_batches_add_up() -> None:
    whole, parts = trainable(), trainable()
    torch.autograd.backward(training_loss(whole, PackedRows.of(*DOCUMENTS)).total)
    for document in DOCUMENTS:
        torch.autograd.backward(training_loss(parts, PackedRows.of(document), divide_by=6).total)
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_transformers() -> None:
    config = random_config(3)
    oracle = transformers_model(config, 3)
    mtp = transformers_mtp(oracle, 4)
    model = kvern_model(config, oracle, mtp)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    make_trainable(model)
    document = torch.randint(0, 96, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    options = LossOptions(mtp=MTPWeight(0.0, 0.0))
    torch.autograd.backward(training_loss(model, PackedRows.of(document), options=options).total)
    oracle.requires_grad_(True)
    ids = torch.tensor([document])
    loss = oracle(input_ids=ids, labels=ids).loss
    torch.autograd.backward(loss)
    trained = [(name, p.grad) for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None]
    ours = dict(pair for name, gradient in trained for pair in ungrouped(name, gradient))
    theirs = checkpoint_names({name: p.grad for name, p in oracle.named_parameters() if p.grad is not None})
    assert len(theirs) > 40
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_weight_of_mtp_by_tokens() -> None:
    weight = MTPWeight()
    assert [weight.at(tokens) for tokens in (0, 10**13 - 1, 10**13)] == [0.3, 0.3, 0.1]


def test_mtp_shares_embedding_and_head() -> None:
    model = trainable()
    names = dict(model.named_parameters(remove_duplicate=False))
    assert names["model.layers.2.embed_tokens.weight"] is names["model.embed_tokens.weight"]
    assert names["model.layers.2.shared_head.head.weight"] is names["lm_head.weight"]
    assert set(checkpoint_state(model)) == set(Transformer(model.config).state_dict())


def test_fp8_covers_every_linear_but_those_kept_precise() -> None:
    model = trainable(recipe=Fp8Recipe())
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Linear)}
    plain = {name for name, m in linears.items() if not isinstance(m, Fp8Linear)}
    assert plain == {"lm_head", "model.layers.2.shared_head.head", "model.layers.2.eh_proj"}
    fp8 = {name for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"} <= fp8
    grouped = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    assert [module.recipe for module in grouped] == [Fp8Recipe()] * 2
    assert "model.layers.2.mlp.shared_experts.gate_proj" in fp8
    assert set(checkpoint_state(model)) == set(Transformer(model.config).state_dict())


def test_fp8_gradients_point_the_same_way() -> None:
    gradients = []
    for recipe in (None, Fp8Recipe()):
        model = trainable(recipe=recipe, std=0.05)
        torch.autograd.backward(training_loss(model, PackedRows.of(*DOCUMENTS), RoutingLog(model)).total)
        grads = [p.grad.flatten() for n, p in model.named_parameters() if p.grad is not None and "experts" not in n]
        gradients.append(torch.cat(grads))
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99


def test_what_cannot_be_trained_is_refused() -> None:
    model = trainable()
    with pytest.raises(ConfigError, match="no token of the batch"):
        training_loss(model, PackedRows.of([1], [2]))
    with pytest.raises(ConfigError, match="empty one"):
        PackedRows.of([1], [])
    with pytest.raises(ConfigError, match="float32 masters"):
        make_trainable(Transformer(tiny_config(torch_dtype="bfloat16")))


def test_a_model_in_fp8_learns_with_balanced_gates() -> None:
    model = trainable(recipe=Fp8Recipe())
    log, balancer, optimizer = RoutingLog(model), LoadBalancer(model), AdamW(parameter_groups(model), 1e-2)
    rows, values = PackedRows.of(*DOCUMENTS), []
    for _ in range(15):
        losses = training_loss(model, rows, log)
        torch.autograd.backward(losses.total)
        clip_gradients(dict(model.named_parameters()))
        optimizer.step()
        optimizer.zero_grad()
        balancer.count(losses.routings)
        balancer.step()
        values.append(float(losses.main + losses.mtp))
    assert values[-1] < 0.5 * values[0]


def test_blocks_computed_twice_change_nothing() -> None:
    results = []
    for twice in (False, True):
        model = trainable(recipe=Fp8Recipe())
        log, balancer = RoutingLog(model), LoadBalancer(model)
        if twice:
            for layer in model.model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        for _ in range(2):
            losses = training_loss(model, PackedRows.of(*DOCUMENTS), log)
            torch.autograd.backward(losses.total)
            balancer.count(losses.routings)
        loads = [load.counts_N.tolist() for load in balancer.step().values()]
        results.append((loads, [p.grad for p in model.parameters() if p.grad is not None]))
    assert results[0][0] == results[1][0]
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, other)

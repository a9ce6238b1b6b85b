"""What tools can be asked for: definitions, and scenes in which one is called and its result put into words.

A scene's values (paths, names, cities, numbers) are drawn anew for each row, so that a model has to copy arguments from
the question instead of remembering them. Results are made up where they only stand for the world, and true where they
are about Python or arithmetic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from recipes.nano.docs import Entry
from recipes.nano.functions import Function
from recipes.nano.rows import listed

Schema: TypeAlias = Mapping[str, Any]

CITIES = (
    *(
        "Rome",
        "Oslo",
        "Berlin",
        "Paris",
        "Madrid",
        "Lisbon",
        "Vienna",
        "Prague",
        "Warsaw",
        "Athens",
        "Dublin",
        "London",
    ),
    *(
        "Tokyo",
        "Osaka",
        "Seoul",
        "Beijing",
        "Delhi",
        "Mumbai",
        "Sydney",
        "Toronto",
        "Chicago",
        "Boston",
        "Lima",
        "Cairo",
    ),
    *("Nairobi", "Lagos", "Helsinki", "Stockholm", "Zurich", "Geneva", "Munich", "Hamburg", "Milan", "Naples", "Porto"),
)
PEOPLE = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Felix",
    "Grace",
    "Hugo",
    "Ida",
    "Jonas",
    "Kate",
    "Leo",
    "Mia",
    "Noah",
)
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
TRANSLATED = {
    "French": {"hello": "bonjour", "thank you": "merci", "good night": "bonne nuit", "water": "eau", "bread": "pain"},
    "German": {"hello": "hallo", "thank you": "danke", "good night": "gute Nacht", "water": "Wasser", "bread": "Brot"},
    "Spanish": {
        "hello": "hola",
        "thank you": "gracias",
        "good night": "buenas noches",
        "water": "agua",
        "bread": "pan",
    },
    "Italian": {"hello": "ciao", "thank you": "grazie", "good night": "buona notte", "water": "acqua", "bread": "pane"},
    "Dutch": {"hello": "hallo", "thank you": "bedankt", "good night": "goedenacht", "water": "water", "bread": "brood"},
}
PACKAGES = (
    "requests",
    "numpy",
    "flask",
    "pytest",
    "attrs",
    "rich",
    "click",
    "pandas",
    "httpx",
    "jinja2",
    "ruff",
    "mypy",
)
NEWS = (
    *("the tests pass", "the build is broken", "the meeting is at ten", "the release is ready", "the server is down"),
    *("the report is late", "lunch is at noon", "the fix is merged", "the demo went well", "the disk is full"),
)
TITLES = (
    *(
        "Crash when the file is empty",
        "Wrong result for negative numbers",
        "Docs lack an example",
        "Slow start on Windows",
    ),
    *("Timeout is ignored", "Typo in the error message", "Memory grows without end", "Add a flag for quiet output"),
)
WORDS = (
    "hello",
    "good morning",
    "thank you",
    "see you soon",
    "where is the station",
    "the door is open",
    "I am hungry",
)
FOLDERS = ("src", "lib", "app", "tools", "tests", "docs", "scripts", "core", "server", "client", "data", "build")


@dataclass(frozen=True)
class World:
    """What scenes draw from."""

    functions: Sequence[Function]
    entries: Sequence[Entry]

    def name(self, rng: random.Random) -> str:
        """Of a function."""
        return rng.choice(self.functions).name.strip("_") or "main"

    def path(self, rng: random.Random, ending: str = ".py") -> str:
        """Of a file that may exist somewhere."""
        return f"{rng.choice(FOLDERS)}/{self.name(rng)}{ending}"


@dataclass(frozen=True)
class Scene:
    """A question, the arguments of the call that it needs, the call's result, and the answer."""

    ask: str
    arguments: Mapping[str, Any]
    result: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """A tool and its scenes."""

    name: str
    description: str
    properties: Mapping[str, Schema]
    draw: Callable[[random.Random, World], Scene]
    optional: tuple[str, ...] = ()

    @property
    def tool(self) -> dict[str, Any]:
        """The definition, as OpenAI's API has it."""
        required = [name for name in self.properties if name not in self.optional]
        parameters = {"type": "object", "properties": dict(self.properties), "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def _text(description: str) -> Schema:
    return {"type": "string", "description": description}


def _whole(description: str) -> Schema:
    return {"type": "integer", "description": description}


def _read_file(rng: random.Random, world: World) -> Scene:
    function, folder = rng.choice(world.functions), rng.choice(FOLDERS)
    path = f"{folder}/{function.name.strip('_') or 'main'}.py"
    ask = rng.choice(("What is in {}?", "Show me the file {}.", "Read {} and tell me what it defines.", "Open {}."))
    says = f"`{path}` defines the function `{function.name}`."
    summary = f" {function.summary}" if function.summary else ""
    return Scene(ask.format(path), {"path": path}, function.source, says + summary)


def _list_files(rng: random.Random, world: World) -> Scene:
    folder = f"{rng.choice(FOLDERS)}/{world.name(rng)}"
    names = sorted(
        {f"{world.name(rng)}{rng.choice(('.py', '.md', '.txt', '.json'))}" for _ in range(rng.randint(1, 4))}
    )
    ask = rng.choice(("Which files are in {}?", "List the files in {}.", "What is in the folder {}?"))
    return Scene(ask.format(folder), {"path": folder}, "\n".join(names), f"`{folder}` holds {listed(names)}.")


def _search(rng: random.Random, world: World) -> Scene:
    pattern = world.name(rng)
    places = [(world.path(rng), rng.randint(1, 400)) for _ in range(rng.randint(0, 3))]
    found = "\n".join(f"{path}:{line}: {pattern}(" for path, line in places)
    ask = rng.choice(("Where is {} used?", "Search for {}.", "Find {} in the code.", "Which files mention {}?"))
    names = listed([f"{path}:{line}" for path, line in places]) if places else ""
    answer = f"`{pattern}` is used in {names}." if places else f"`{pattern}` is used nowhere."
    return Scene(ask.format(pattern), {"pattern": pattern}, found or "no matches", answer)


def _find_definition(rng: random.Random, world: World) -> Scene:
    name, path, line = world.name(rng), world.path(rng), rng.randint(1, 900)
    ask = rng.choice(("Where is `{}` defined?", "Find the definition of {}.", "In which file is {}?"))
    return Scene(ask.format(name), {"name": name}, f"{path}:{line}", f"`{name}` is defined in `{path}`, line {line}.")


def _run_tests(rng: random.Random, world: World) -> Scene:
    path, passed, failed = world.path(rng), rng.randint(1, 60), rng.choice((0, 0, 0, 1, 2))
    path = path if rng.random() < 0.3 else f"tests/test_{path.split('/')[1]}"
    counts = f"{failed} failed, {passed} passed" if failed else f"{passed} passed"
    ask = rng.choice(("Run the tests in {}.", "Do the tests in {} pass?", "Test {}.", "Please run {}."))
    answer = f"{failed} of {failed + passed} tests failed." if failed else f"All {passed} tests passed."
    return Scene(ask.format(path), {"path": path}, f"{counts} in {rng.randint(1, 90) / 10}s", answer)


def _documentation(rng: random.Random, world: World) -> Scene:
    entry = rng.choice(world.entries)
    ask = rng.choice(("Look up {} in the documentation.", "What do the docs say about {}?", "Look up `{}`."))
    text = entry.text or entry.signature
    return Scene(ask.format(entry.full_name), {"name": entry.full_name}, f"{entry.signature}\n\n{text}", text)


def _weather(rng: random.Random, world: World) -> Scene:
    city, degrees, sky = rng.choice(CITIES), rng.randint(-5, 35), rng.choice(SKIES)
    ask = rng.choice(
        ("What is the weather in {}?", "How is the weather in {} today?", "Is it warm in {}?", "Weather in {}, please.")
    )
    result = json.dumps({"temperature": degrees, "sky": sky})
    return Scene(ask.format(city), {"city": city}, result, f"It is {sky} in {city}, at {degrees} degrees.")


def _time(rng: random.Random, world: World) -> Scene:
    city, clock = rng.choice(CITIES), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    ask = rng.choice(("What time is it in {}?", "How late is it in {}?", "Tell me the time in {}."))
    return Scene(ask.format(city), {"city": city}, clock, f"It is {clock} in {city}.")


def _calculate(rng: random.Random, world: World) -> Scene:
    left, right = rng.randint(2, 999), rng.randint(2, 99)
    sign, word = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times")))
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    expression = f"{left} {sign} {right}"
    asked = rng.choice((expression, f"{left} {word} {right}"))
    ask = rng.choice(("What is {}?", "Compute {}.", "How much is {}?", "Calculate {}."))
    return Scene(ask.format(asked), {"expression": expression}, str(value), f"{asked} is {value}.")


def _send(rng: random.Random, world: World) -> Scene:
    person, news = rng.choice(PEOPLE), rng.choice(NEWS)
    ask = rng.choice(("Tell {} that {}.", "Send {} a message: {}.", "Let {} know that {}.", "Write to {} that {}."))
    return Scene(ask.format(person, news), {"to": person, "text": news}, "sent", f"I told {person} that {news}.")


def _issue(rng: random.Random, world: World) -> Scene:
    title, number = rng.choice(TITLES), rng.randint(1, 999)
    ask = rng.choice(('Open an issue called "{}".', 'Create an issue: "{}".', 'File a bug with the title "{}".'))
    return Scene(ask.format(title), {"title": title}, json.dumps({"number": number}), f"I opened issue {number}.")


def _log(rng: random.Random, world: World) -> Scene:
    path, limit = world.path(rng), rng.randint(2, 4)
    commits = [f"{rng.randrange(16**7):07x} {rng.choice(TITLES)}" for _ in range(limit)]
    ask = rng.choice(("Show the last {} commits of {}.", "What are the {} latest commits of {}?"))
    last = commits[0].split(" ", 1)
    answer = f"The latest commit of `{path}` is {last[0]}: {last[1]}."
    return Scene(ask.format(limit, path), {"path": path, "limit": limit}, "\n".join(commits), answer)


def _move(rng: random.Random, world: World) -> Scene:
    source, target = world.path(rng), world.path(rng)
    ask = rng.choice(("Move {} to {}.", "Rename the file {} to {}.", "Please move {} to {}."))
    arguments = {"source": source, "target": target}
    return Scene(ask.format(source, target), arguments, "ok", f"I moved `{source}` to `{target}`.")


def _delete(rng: random.Random, world: World) -> Scene:
    path = world.path(rng, rng.choice((".py", ".txt", ".log")))
    missing = rng.random() < 0.25
    ask = rng.choice(("Delete {}.", "Remove the file {}.", "Please delete {}."))
    answer = f"There is no file `{path}`." if missing else f"I deleted `{path}`."
    return Scene(ask.format(path), {"path": path}, "error: no such file" if missing else "ok", answer)


def _write(rng: random.Random, world: World) -> Scene:
    path, content = world.path(rng, rng.choice((".txt", ".md"))), rng.choice((*NEWS, *WORDS))
    ask = rng.choice(('Write "{1}" into {0}.', 'Create {0} with the text "{1}".', 'Save "{1}" as {0}.'))
    arguments = {"path": path, "content": content}
    return Scene(ask.format(path, content), arguments, "ok", f"I wrote the text into `{path}`.")


def _translate(rng: random.Random, world: World) -> Scene:
    language = rng.choice(list(TRANSLATED))
    text, result = rng.choice(list(TRANSLATED[language].items()))
    ask = rng.choice(('Translate "{}" into {}.', 'How does one say "{}" in {}?', 'What is "{}" in {}?'))
    arguments = {"text": text, "language": language}
    return Scene(ask.format(text, language), arguments, result, f'In {language}: "{result}".')


def _timer(rng: random.Random, world: World) -> Scene:
    minutes = rng.randint(2, 90)
    ask = rng.choice(("Set a timer for {} minutes.", "Wake me in {} minutes.", "Remind me in {} minutes."))
    return Scene(ask.format(minutes), {"minutes": minutes}, "ok", f"The timer is set to {minutes} minutes.")


def _user(rng: random.Random, world: World) -> Scene:
    number, name = rng.randint(1, 9999), rng.choice(PEOPLE)
    ask = rng.choice(("Who is user {}?", "Look up the user with the id {}.", "What is the name of user {}?"))
    result = json.dumps({"id": number, "name": name})
    return Scene(ask.format(number), {"id": number}, result, f"User {number} is {name}.")


def _install(rng: random.Random, world: World) -> Scene:
    package = rng.choice(PACKAGES)
    version = f"{rng.randint(0, 9)}.{rng.randint(0, 20)}.{rng.randint(0, 9)}"
    ask = rng.choice(("Install {}.", "I need {}, please install it.", "Add the package {}."))
    return Scene(
        ask.format(package), {"name": package}, f"installed {package} {version}", f"{package} {version} is installed."
    )


def _branch(rng: random.Random, world: World) -> Scene:
    branch = f"{rng.choice(('fix', 'feature', 'docs'))}/{world.name(rng)}"
    ask = rng.choice(("Which branch am I on?", "What is the current branch?", "On which branch are we?"))
    return Scene(ask, {}, branch, f"You are on the branch `{branch}`.")


SKILLS = (
    Skill("read_file", "Read a text file", {"path": _text("The file")}, _read_file),
    Skill("list_files", "List the files of a folder", {"path": _text("The folder")}, _list_files),
    Skill("search", "Search the code for a text", {"pattern": _text("What to look for")}, _search),
    Skill("find_definition", "Find where a name is defined", {"name": _text("The name")}, _find_definition),
    Skill("run_tests", "Run the tests of a file", {"path": _text("The file")}, _run_tests),
    Skill(
        "get_documentation", "Look up a name in Python's documentation", {"name": _text("Dotted name")}, _documentation
    ),
    Skill("get_weather", "The weather in a city", {"city": _text("The city")}, _weather),
    Skill("get_time", "The time of day in a city", {"city": _text("The city")}, _time),
    Skill("calculate", "Compute an arithmetic expression", {"expression": _text("As in Python")}, _calculate),
    Skill("send_message", "Send a message to a person", {"to": _text("Who"), "text": _text("What")}, _send),
    Skill("create_issue", "Open an issue", {"title": _text("Its title")}, _issue),
    Skill("git_log", "The latest commits of a file", {"path": _text("The file"), "limit": _whole("How many")}, _log),
    Skill("move_file", "Move a file", {"source": _text("From"), "target": _text("To")}, _move),
    Skill("delete_file", "Delete a file", {"path": _text("The file")}, _delete),
    Skill("write_file", "Write a text file", {"path": _text("The file"), "content": _text("The text")}, _write),
    Skill("translate", "Translate a text", {"text": _text("The text"), "language": _text("Into which")}, _translate),
    Skill("set_timer", "Set a timer", {"minutes": _whole("After how many minutes it rings")}, _timer),
    Skill("get_user", "Look up a user", {"id": _whole("The user's number")}, _user),
    Skill("install_package", "Install a Python package", {"name": _text("The package")}, _install),
    Skill("current_branch", "The branch that is checked out", {}, _branch),
)

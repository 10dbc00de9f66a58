"""The tutorial and the how-tos: every block of code is run, on tiny models, unless the page says why not.

The blocks of a page run one after another in one folder, as a reader would run them:

- ``python`` is executed; all blocks of a page share their names.
- ``bash`` is run line by line. ``molsaki`` and ``python`` run in this process, since starting one takes
  seconds; the two processes of ``torchrun`` are forked for the same reason.
- A block whose first line is a comment with a file name, such as ``# mine.py``, is saved under this name.
- The first ``text`` after such a block is its output: names of lines ``name: value`` have to be in the real one, too.
- ``<!-- not run: reason -->`` on the line before a block excludes it.

``teacher``, ``student`` and the data files, which the tutorial creates, exist before a how-to begins. Trainings have a
few steps. Random models cannot write rationales, so ``annotate`` gets replies from the data, through a server where the
page names one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molsaki import cli
from molsaki.annotation import local_teacher
from molsaki.evaluation.generate import Reply
from molsaki.io import read_json_lines
from tests.helpers import completions, processes, small_tokenizers, tiny
from tests.helpers.tiny import one_thread  # noqa: F401

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))]
OTHERS = [DOCS / f"{name}.md" for name in ("concepts", "citation", "long-texts", "study", "data", "key-words")]
SLOW = {"several-gpus"}  # starts processes
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml|jsonl|json|sh))$", re.M)
RUN = {"bash", "python"}
SHOWN = {"text", "json", "yaml", "bibtex"}  # never run; a file that a command needs begins with its name


@dataclasses.dataclass
class Block:
    language: str
    body: str
    reason: str | None
    line: int

    @property
    def file(self) -> str | None:
        found = FILE.match(self.body)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(match["language"], match["body"], match["reason"], line))
    return found


def commands(body: str) -> list[list[str]]:
    """The commands of a bash block, in words; a line that ends in a backslash continues."""
    lines = body.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def make_tiny_models(folder: Path) -> None:
    """``teacher`` and ``student`` with one tokenizer that has a chat template."""
    tokenizer = tiny.tokenizer(merges=120)
    tokenizer.chat_template = small_tokenizers.CHATML
    for name, layers in (("teacher", 3), ("student", 2)):
        tiny.save(folder / name, layers, tokenizer, seed=layers, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_models(folder)
    return folder


MOST_STEPS = 8  # of a training
SERVER = "http://localhost:8000/v1"


def written_rationale(prompt: str) -> str:
    """A right reply to the last question of a prompt; to the first question of the data a wrong one."""
    rows = read_json_lines(Path("train.jsonl"))
    number, row = max(enumerate(rows), key=lambda pair: prompt.rfind(pair[1]["question"]))
    return f"{row['rationale']}\nAnswer: {row['answer']}" if number else "I do not know.\nAnswer: 0"


def written_rationales(model, tokenizer, prompts, new_tokens, **_):
    return [Reply(written_rationale(tokenizer.decode(ids)), True) for ids in prompts], new_tokens * len(prompts)


class Reader:
    """Runs the blocks of a page in a folder, as someone who follows it."""

    def __init__(self, folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.folder, self.models, self.patch, self.capture = folder, models, monkeypatch, capfd
        self.names: dict[str, object] = {"__name__": "page"}
        self.output: str | None = None

    def run(self, block: Block) -> None:
        if block.reason is not None:
            return
        if block.file:
            path = Path(block.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body)
        elif block.language in RUN:
            self.capture.readouterr()
            if block.language == "python":
                exec(compile(block.body, f"line {block.line}", "exec"), self.names)
            else:
                for words in commands(block.body):
                    self.command(words)
            self.output = self.capture.readouterr().out
        elif block.language == "text" and self.output is not None:
            self.compare(block, self.output)
            self.output = None

    def compare(self, block: Block, output: str) -> None:
        """Every ``name: value`` that the page shows is in what the last commands printed."""
        shown, real = (set(re.findall(r"^([a-z_]+): ", text, re.M)) for text in (block.body, output))
        assert shown <= real, f"line {block.line}: {sorted(shown - real)} not in {sorted(real)}"

    def command(self, words: list[str]) -> None:
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            self.patch.setenv(name, value)
        program, *arguments = words
        if program == "cd":
            os.chdir(arguments[0])
        elif program == "molsaki" and SERVER in arguments:
            server = completions.Server(lambda body, number: written_rationale(completions.text_of(body)))
            with completions.serving(server):
                self.command([server.url if word == SERVER else word for word in words])
        elif program == "molsaki":
            self.patch.setattr(local_teacher, "decode", written_rationales)
            if "--max_steps" in arguments:  # enough for a model that is random before and after
                number = arguments.index("--max_steps") + 1
                arguments[number] = str(min(int(arguments[number]), MOST_STEPS))
            code = cli.main(arguments)
            assert code == 0, f"{shlex.join(words)}: exit code {code}: {self.capture.readouterr().err[-1500:]}"
        elif program == "python" and arguments[0].endswith(("make_teacher.py", "cut_student.py")):
            self.copy_of_model(arguments)
        elif program == "python" and arguments[0].endswith(".py"):
            self.python(arguments)
        elif words[:5] == ["torchrun", "--nproc_per_node", "2", "-m", "molsaki.cli"]:  # without the seconds of imports
            done = processes.ranks("command", *words[5:])
            assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout[-1500:]} {done.stderr[-3000:]}"
            print(done.stdout)
        else:
            result = subprocess.run(words, capture_output=True, text=True)
            assert result.returncode == 0, f"{shlex.join(words)}: {result.stdout[-1500:]} {result.stderr[-3000:]}"
            print(result.stdout)

    def copy_of_model(self, arguments: list[str]) -> None:
        """A tiny model instead of SmolLM2 and of the one that is cut from it."""
        assert Path(arguments[0]).is_file(), arguments[0]
        made = next(Path(word) for word in arguments[1:] if word in ("teacher", "student") and not Path(word).exists())
        shutil.copytree(self.models / made.name, made)

    def python(self, arguments: list[str]) -> None:
        folder = str(Path(arguments[0]).resolve().parent)
        before = set(sys.modules)
        self.patch.setattr(sys, "argv", arguments)
        self.patch.setattr(sys, "path", [folder, *sys.path])
        runpy.run_path(arguments[0], run_name="__main__")
        for name in set(sys.modules) - before:  # files of the page, which the next page may have, too
            if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
                del sys.modules[name]


@pytest.fixture
def reader(tmp_path, models, monkeypatch, capfd):
    """In a folder two levels below a checkout, as the tutorial's."""
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    folder = tmp_path / "runs/tutorial"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    known = set(sys.modules)
    yield Reader(folder, models, monkeypatch, capfd)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    from molsaki.text import key_words, sentences

    key_words._own_selector.cache_clear()
    sentences._own_splitter.cache_clear()


def marked(page: Path):
    return pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_a_page_can_be_followed(page, reader):
    if page.stem == "tutorial":
        os.chdir("../..")
    else:
        for name in ("teacher", "student"):
            shutil.copytree(reader.models / name, name)
        rows = tiny.problems(24)
        tiny.write_jsonl(Path("train.jsonl"), rows[:16])
        tiny.write_jsonl(Path("test.jsonl"), rows[16:])
        questions = [{"id": row["id"], "question": row["question"], "gold": row["answer"]} for row in rows[:4]]
        tiny.write_jsonl(Path("questions.jsonl"), questions)
    for block in blocks(page):
        reader.run(block)


def test_the_worked_example_of_the_concepts(reader):
    (block,) = [block for block in blocks(DOCS / "concepts.md") if block.language == "python"]
    reader.run(block)
    text = (DOCS / "concepts.md").read_text()
    teacher, p, q = (reader.names[name] for name in ("teacher", "p", "q"))
    for row, heading in ((teacher, r"\*\*the step: their sum\*\*"), (p, "teacher"), (q, "student")):
        cells = re.search(rf"^\| {heading} \|(.*)\|$", text, re.M)[1]
        shown = [float(cell.strip(" *")) for cell in cells.split("|")]
        assert shown == pytest.approx(row.tolist(), abs=0.0051)
    assert (p * (p / q).log()).sum().item() == pytest.approx(0.0295, abs=1e-4)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.stem)
def test_every_block_has_a_language_and_a_reason_if_it_is_not_run(page):
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert len(found) == len(re.findall(r"^```\w", text, re.M)) == len(re.findall(r"^```$", text, re.M))
    assert text.count("<!-- not run") == sum(block.reason is not None for block in found)
    for block in found:
        assert block.language in RUN | SHOWN, f"line {block.line}: {block.language}"
        assert block.reason is None or len(block.reason.split()) > 2, f"line {block.line}: {block.reason}"


def test_a_wrong_page_fails(reader, tmp_path):
    """The mechanism can fail: an unknown flag, an exception, a file that is not there, an output with another name."""

    def block(language: str, body: str) -> Block:
        return Block(language, body, None, 1)

    with pytest.raises(AssertionError, match="exit code"):
        reader.run(block("bash", "molsaki store info nowhere\n"))
    with pytest.raises(AssertionError, match="No such file"):
        reader.run(block("bash", "ls nowhere\n"))
    with pytest.raises(ZeroDivisionError):
        reader.run(block("python", "1 / 0\n"))
    reader.run(block("bash", "echo 'accuracy: 1'\n"))
    with pytest.raises(AssertionError, match="precision"):
        reader.run(block("text", "precision: 0.5\n"))

"""The page of `evaluate.py report`: its data is that of the folders, and no text in it is ever markup."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import evaluate
from evaluate import grade, record, summarize
from records import clean
from rollout import Episode
from tools import report as report_tool

TEMPLATE = Path(report_tool.__file__).with_name("report.html").read_text()
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<!-- <script> <script>document.title='owned'</script> -->",
    "<img src=x onerror=\"document.title='owned'\"> &lt;b&gt; &amp;",
    "\u2028 \u2029 \0 \ud800 \udfff \ufeff",
    "\u202e right to left \u2066 \u200f",
    "]]> </answer> <|end_of_query|> ${document.title='owned'} \\u003cscript>",
    "word " * 40_000,  # 200 kB
    "x" * 200_000,
]


def episode(number: int, passage: str = "words", text: str = "b") -> Episode:
    e = Episode({"id": f"q{number}", "question": f"who is {number}?", "answers": ["b", "b c"], "dataset": "d"}, [1])
    e.add("prompt", [1], f"Question: who is {number}?\n<think>")
    e.add("policy", [2], " <|begin_of_query|> red <|end_of_query|>", [-0.5])
    e.add("documents", [3], f"\n\n<|begin_of_documents|>\n(1)T   {passage}\n<|end_of_documents|>")
    e.add("policy", [4], f" </think> <answer> {text} </answer>", [-0.5])
    e.queries, e.finish_reason = ["red"], "answer"
    grade(e, "stage2")
    return e


def training_run(folder: Path, episodes: list[Episode], per_step: int = 4, **config) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "m", "learning_rate": 2e-6, **config}))
    lines = [{"step": i // per_step + 1} | dataclasses.asdict(e) for i, e in enumerate(episodes)]
    (folder / "trajectories.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"step": step, "reward": step / 10, "kl": float("nan")} for step in sorted({line["step"] for line in lines})]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluation(folder: Path, episodes: list[Episode], **protocol) -> Path:
    folder.mkdir()
    records = [record(e) for e in episodes]
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    done = {"protocol": {"model": "m", **protocol}, "results": {"d": summarize(records)}}
    (folder / "metrics.json").write_text(json.dumps(done))
    return folder


class Page(HTMLParser):
    """Its elements, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def report(out: Path, *folders: Path, **options) -> dict:
    """Write the page and read its data back."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    report_tool.main(["report", *map(str, folders), "--out", str(out), *flags])
    return json.loads(Page(out.read_text()).scripts[0])


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        report_tool.main(["report", *map(str, argv)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_data_is_that_of_the_folders(tmp_path):
    episodes = [episode(i, text="b" if i % 2 else "x") for i in range(8)]
    run = training_run(tmp_path / "stage1", episodes)
    done = evaluation(tmp_path / "eval", episodes[:3], seed=1)
    trained, evaluated = report(tmp_path / "r.html", run, done)["runs"]
    assert (trained["name"], evaluated["name"]) == ("stage1", "eval")
    assert trained["settings"] == json.loads((run / "config.json").read_text())
    assert trained["metrics"] == [{"step": 1, "reward": 0.1, "kl": None}, {"step": 2, "reward": 0.2, "kl": None}]
    expected = json.loads(json.dumps([{"step": i // 4 + 1} | record(e) for i, e in enumerate(episodes)]))
    assert trained["trajectories"] == expected and trained["total"] == 8
    saved = json.loads((done / "metrics.json").read_text())
    assert (evaluated["settings"], evaluated["results"]) == (saved["protocol"], saved["results"])
    assert evaluated["trajectories"] == [json.loads(line) for line in (done / "transcripts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("passage", HOSTILE, ids=range(len(HOSTILE)))
def test_a_passage_stays_text(tmp_path, passage):
    harmless = Page(TEMPLATE)
    data = report(tmp_path / "r.html", evaluation(tmp_path / passage[:1].encode().hex(), [episode(0, passage, passage)]))
    page = Page((tmp_path / "r.html").read_text())
    assert page.tags == harmless.tags and page.scripts[1:] == harmless.scripts[1:]
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == ["application/json", None]
    (trajectory,) = data["runs"][0]["trajectories"]
    assert trajectory["segments"][2][1] == f"\n\n<|begin_of_documents|>\n(1)T   {passage}\n<|end_of_documents|>"
    assert (tmp_path / "r.html").read_bytes().split(b"\n")[0].isascii()


def test_the_page_loads_nothing_and_makes_no_markup():
    assert "default-src 'none'" in TEMPLATE
    assert not re.search(
        r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//|@import|url\(|fetch\(|XMLHttp|WebSocket|import\(", TEMPLATE
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|DOMParser|srcdoc", TEMPLATE)


def test_no_key_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "environment-secret")
    run = training_run(tmp_path / "run", [episode(0)], SERPER_API_KEY="config-secret", judge={"my_api_key": "nested-secret"})
    done = evaluation(tmp_path / "eval", [episode(0)], OPENAI_API_KEY="protocol-secret")
    settings = [run["settings"] for run in report(tmp_path / "r.html", run, done)["runs"]]
    assert "secret" not in (tmp_path / "r.html").read_text()
    assert settings == [{"model": "m", "learning_rate": 2e-6, "judge": {}}, {"model": "m"}]


def test_too_many_trajectories_are_thinned_evenly(tmp_path):
    runs = [training_run(tmp_path / name, [episode(i) for i in range(40)]) for name in ("a", "b")]
    for run in report(tmp_path / "r.html", *runs, max_trajectories=20)["runs"]:
        assert [t["step"] for t in run["trajectories"]] == list(range(1, 11)) and run["total"] == 40
    assert all(run["trajectories"] == [] for run in report(tmp_path / "r.html", *runs, max_trajectories=0)["runs"])


def test_a_run_that_is_still_writing_or_keeps_no_trajectories(tmp_path):
    run = training_run(tmp_path / "run", [episode(i) for i in range(8)])
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        (run / name).write_bytes((run / name).read_bytes()[:-5])  # torn in its last line
    data = report(tmp_path / "r.html", run)["runs"][0]
    assert [row["step"] for row in data["metrics"]] == [1] and data["total"] == len(data["trajectories"]) == 7
    (run / "trajectories.jsonl").unlink()
    data = report(tmp_path / "r.html", run)["runs"][0]
    assert data["trajectories"] == [] and data["total"] is None


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for seed in "01":
        (tmp_path / seed).mkdir()
    runs = [training_run(tmp_path / seed / "stage1", [episode(0)]) for seed in "01"]
    assert [run["name"] for run in report(tmp_path / "r.html", *runs)["runs"]] == [str(folder) for folder in runs]


def test_what_is_no_run_is_named(tmp_path, capsys):
    out = f"--out={tmp_path / 'r.html'}"
    assert "nowhere" in refused(capsys, tmp_path / "nowhere", out)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    assert "half: " in (error := refused(capsys, tmp_path / "half", out)) and "metrics.jsonl missing" in error
    foreign = evaluation(tmp_path / "foreign", [episode(0)])
    (foreign / "transcripts.jsonl").write_text('{"id": 1}\n')
    assert "foreign" in refused(capsys, foreign, out)
    (foreign / "transcripts.jsonl").write_text("no JSON\n")
    assert "transcripts.jsonl:1" in refused(capsys, foreign, out)
    (foreign / "metrics.json").write_text("[1]")
    assert "foreign" in refused(capsys, foreign, out)
    assert not (tmp_path / "r.html").exists()


def test_only_a_report_is_overwritten(tmp_path, capsys):
    run = training_run(tmp_path / "run", [episode(0)])
    for text in ("my notes", "", TEMPLATE):
        (tmp_path / "r.html").write_text(text)
        assert "r.html" in refused(capsys, run, f"--out={tmp_path / 'r.html'}")
        assert (tmp_path / "r.html").read_text() == text
    (tmp_path / "r.html").unlink()
    report(tmp_path / "r.html", run)
    (run / "config.json").write_text('{"model": "another"}')
    assert report(tmp_path / "r.html", run)["runs"][0]["settings"] == {"model": "another"}


def test_contrast():
    """At least 4.5 to 1 (WCAG AA) for every pair of text and background, light and dark."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", TEMPLATE, re.S)]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    pairs = [(name, "page") for name in ("text", "faint", "accent", "good", "bad")]
    pairs += [(name, "panel") for name in ("text", "faint", "run-0", "run-1", "run-2", "run-3")]
    pairs += [(name, f"{name}-back") for name in ("query", "documents", "answer")]
    for colours in schemes:
        for front, back in pairs:
            dark, light = sorted(luminance(colours[name]) for name in (front, back))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_a_real_training_run(tmp_path, model_folder, monkeypatch):
    import dataclasses

    from tiny import make_world

    import train

    monkeypatch.chdir(tmp_path)
    train.train(dataclasses.replace(make_world(tmp_path, model_folder), steps=2), Path("run"), False, None)
    (run,) = report(Path("r.html"), Path("run"))["runs"]
    assert [row["step"] for row in run["metrics"]] == [1, 2] and {t["step"] for t in run["trajectories"]} == {1, 2}
    assert run["total"] == len(run["trajectories"]) == 8 and all(
        t["segments"][1][0] == "policy" for t in run["trajectories"]
    )


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser(tmp_path):
    passages = [clean(passage) for passage in HOSTILE]  # --dump-dom itself gives up on a lone surrogate
    report(tmp_path / "r.html", evaluation(tmp_path / "eval", [episode(i, text) for i, text in enumerate(passages)]))
    quiet = "--no-first-run --disable-gpu --disable-quic --disable-background-networking --disable-component-update"
    for number, passage in enumerate(passages, 1):
        url = (tmp_path / "r.html").as_uri() + f"#t={number}&filter=right"
        flags = [*quiet.split(), "--no-sandbox", "--disable-sync", f"--user-data-dir={tmp_path / str(number)}", "--dump-dom"]
        page = subprocess.run(["chromium", "--headless", *flags, url], capture_output=True, timeout=300).stdout.decode()
        shown = page.split("<main>")[1].split("</main>")[0]
        assert f"{number} of {len(HOSTILE)}" in shown and "<title>eval · nanosearcher</title>" in page
        assert len(Page(page).scripts) == 2 and "<img" not in shown and "<script" not in shown
        assert ("show all" in shown.split('class="segment documents"')[1]) == (len(passage) > 3000)
        assert len(shown) < 60_000

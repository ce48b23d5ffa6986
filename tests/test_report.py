"""tools/report.py: the page holds the data of the folders, and no text in it is ever markup."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from metrics import episode_record, measure_by_dataset, summarize
from records import replace_surrogates
from reward import score_episode
from rollout import Episode
from tools import report

TEMPLATE = Path(report.__file__).with_name("report.html").read_text()
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
    question = {"id": f"q{number}", "question": f"who is {number}?", "answers": ["b", "b c"]}
    e = Episode(question | {"dataset": "d"}, [1], queries=["red"], finish_reason="answer")
    e.add("prompt", [1], f"Question: who is {number}?\n<think>")
    e.add("policy", [2], " <|begin_of_query|> red <|end_of_query|>", [-0.5])
    e.add("documents", [3], f"\n\n<|begin_of_documents|>\n(1)T   {passage}\n<|end_of_documents|>")
    e.add("policy", [4], f" </think> <answer> {text} </answer>", [-0.5])
    e.rewards = score_episode(e.segments, 1, e.question["answers"])
    return e


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_run(folder: Path, episodes: list[Episode], **config) -> Path:
    """A run folder of train.py with four episodes a step."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": "m", **config}))
    lines = [{"step": i // 4 + 1} | dataclasses.asdict(e) for i, e in enumerate(episodes)]
    write_lines(folder / "trajectories.jsonl", lines)
    steps = sorted({line["step"] for line in lines})
    write_lines(
        folder / "metrics.jsonl", [{"step": s, "reward": s / 10, "kl": float("nan")} for s in steps]
    )
    return folder


def evaluation(folder: Path, episodes: list[Episode], **protocol) -> Path:
    """A folder of evaluate.py run."""
    folder.mkdir()
    rows = [episode_record(e) for e in episodes]
    write_lines(folder / "transcripts.jsonl", rows)
    metrics = {"protocol": {"model": "m", **protocol}, "results": {"d": summarize(rows)}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


class Page(HTMLParser):
    """The elements of a page, and the text of each script."""

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


def write_page(out: Path, *folders: Path, max_trajectories: int = 2000) -> list[dict]:
    """Write the page and read the data of its runs back."""
    flags = [f"--out={out}", f"--max_trajectories={max_trajectories}"]
    report.main(["page", *map(str, folders), *flags])
    return json.loads(Page(out.read_text()).scripts[0])["runs"]


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        report.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_the_data_is_that_of_the_folders(tmp_path):
    episodes = [episode(i, text="b" if i % 2 else "x") for i in range(8)]
    run = training_run(tmp_path / "stage1", episodes)
    done = evaluation(tmp_path / "eval", episodes[:3], seed=1)
    trained, evaluated = write_page(tmp_path / "r.html", run, done)
    rows = json.loads(json.dumps([episode_record(e) for e in episodes]))
    assert trained == {
        "name": "stage1",
        "settings": {"model": "m"},
        "metrics": [{"step": step, "reward": step / 10, "kl": None} for step in (1, 2)],
        "trajectories": [{"step": i // 4 + 1} | row for i, row in enumerate(rows)],
        "total": 8,
    }
    metrics = json.loads((done / "metrics.json").read_text())
    assert evaluated == {
        "name": "eval",
        "settings": metrics["protocol"],
        "results": metrics["results"],
        "trajectories": rows[:3],
        "total": 3,
    }


@pytest.mark.parametrize("passage", HOSTILE, ids=range(len(HOSTILE)))
def test_a_passage_stays_text(tmp_path, passage):
    run = evaluation(tmp_path / "eval", [episode(0, passage, passage)])
    (data,) = write_page(tmp_path / "r.html", run)
    page, harmless = Page((tmp_path / "r.html").read_text()), Page(TEMPLATE)
    assert page.tags == harmless.tags and page.scripts[1:] == harmless.scripts[1:]
    assert passage in data["trajectories"][0]["segments"][2][1]
    assert (tmp_path / "r.html").read_bytes().split(b"\n")[0].isascii()


def test_the_page_loads_nothing_and_makes_no_markup():
    assert "default-src 'none'" in TEMPLATE
    loads = r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//|@import|url\(|fetch\(|XMLHttp|WebSocket"
    assert not re.search(loads + r"|import\(", TEMPLATE)
    markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|DOMParser|srcdoc"
    assert not re.search(markup, TEMPLATE)


def test_no_key_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret")
    keys = {"SERPER_API_KEY": "secret", "judge": {"my_api_key": "secret"}}
    run = training_run(tmp_path / "run", [episode(0)], **keys)
    done = evaluation(tmp_path / "eval", [episode(0)], OPENAI_API_KEY="secret")
    runs = write_page(tmp_path / "r.html", run, done)
    assert "secret" not in (tmp_path / "r.html").read_text()
    assert [run["settings"] for run in runs] == [{"model": "m", "judge": {}}, {"model": "m"}]


def test_too_many_trajectories_are_thinned_evenly(tmp_path):
    runs = [training_run(tmp_path / name, [episode(i) for i in range(40)]) for name in ("a", "b")]
    for run in write_page(tmp_path / "r.html", *runs, max_trajectories=20):
        assert [t["step"] for t in run["trajectories"]] == list(range(1, 11)) and run["total"] == 40
    for run in write_page(tmp_path / "r.html", *runs, max_trajectories=0):
        assert run["trajectories"] == [] and run["total"] == 40


def test_a_run_that_is_still_writing_or_keeps_no_trajectories(tmp_path):
    run = training_run(tmp_path / "run", [episode(i) for i in range(8)])
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        (run / name).write_bytes((run / name).read_bytes()[:-5])  # torn in its last line
    (data,) = write_page(tmp_path / "r.html", run)
    assert [row["step"] for row in data["metrics"]] == [1]
    assert data["total"] == len(data["trajectories"]) == 7
    (run / "trajectories.jsonl").unlink()
    (data,) = write_page(tmp_path / "r.html", run)
    assert data["trajectories"] == [] and data["total"] is None


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [training_run(tmp_path / seed / "stage1", [episode(0)]) for seed in "01"]
    names = [run["name"] for run in write_page(tmp_path / "r.html", *runs)]
    assert names == [str(folder) for folder in runs]


def test_what_is_no_run_is_named(tmp_path, capsys):
    page = ["page", f"--out={tmp_path / 'r.html'}"]
    assert "nowhere" in refused(capsys, *page, tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    error = refused(capsys, *page, tmp_path / "half")
    assert "half: " in error and "no metrics.jsonl" in error
    foreign = evaluation(tmp_path / "foreign", [episode(0)])
    for name, content, named in (
        ("transcripts.jsonl", '{"id": 1}\n', "foreign: "),
        ("transcripts.jsonl", "no JSON\n", "transcripts.jsonl:1"),
        ("metrics.json", "[1]", "metrics.json"),
    ):
        (foreign / name).write_text(content)
        assert named in refused(capsys, *page, foreign)
    assert "no run folder" in refused(capsys, *page) and not (tmp_path / "r.html").exists()


def test_only_a_page_is_overwritten(tmp_path, capsys):
    out = tmp_path / "r.html"
    run = training_run(tmp_path / "run", [episode(0)])
    for text in ("my notes", "", TEMPLATE):
        out.write_text(text)
        assert "r.html" in refused(capsys, "page", run, "--out", out)
        assert out.read_text() == text
    out.unlink()
    write_page(out, run)
    (run / "config.json").write_text('{"model": "another"}')
    assert write_page(out, run)[0]["settings"] == {"model": "another"}


def test_contrast():
    """At least 4.5 to 1 (WCAG AA) for every pair of text and background, light and dark."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    blocks = re.findall(r":root \{(.*?)\}", TEMPLATE, re.S)
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    pairs = [(name, "page") for name in "text faint accent good bad".split()]
    pairs += [(name, "panel") for name in "text faint run-0 run-1 run-2 run-3".split()]
    pairs += [(name, f"{name}-back") for name in "query documents answer".split()]
    for colours in schemes:
        for front, back in pairs:
            dark, light = sorted(luminance(colours[name]) for name in (front, back))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_plot(tmp_path, capsys):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        rows = [{"step": step, **dict.fromkeys(report.PANELS, 0.1 * step)} for step in (1, 2, 3)]
        del rows[0]["log_prob_right"]  # has no data yet
        rows[1]["eval_f1"] = 0.5
        write_lines(tmp_path / name / "metrics.jsonl", rows)
    done = evaluation(tmp_path / "eval", [episode(0)])
    results = measure_by_dataset([episode_record(episode(0))])
    (done / "metrics.json").write_text(json.dumps({"protocol": {}, "results": results}))
    runs = ["--runs", str(tmp_path / "stage1"), str(tmp_path / "stage2")]
    out = tmp_path / "c.png"
    report.main(["plot", *runs, "--evaluations", str(done), "--out", str(out)])
    assert out.read_bytes()[:4] == b"\x89PNG" and "eval d" in capsys.readouterr().out
    report.main(["plot", *runs, "--out", str(tmp_path / "c.html")])  # a PNG whatever its name
    assert (tmp_path / "c.html").read_bytes() == out.read_bytes()
    (tmp_path / "stage1" / "metrics.jsonl").write_text('{"reward": 1}\n')
    assert "metrics.jsonl:1" in refused(capsys, "plot", *runs)


def test_learning_draws_means_and_ranges_over_seeds(tmp_path, monkeypatch, capsys):
    metric = "eval_f1_demo-1hop-who"
    folders = [tmp_path / f"seed{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        for stage in report.STAGES:
            (folder / stage).mkdir(parents=True)
            rows = [{"step": step, "search_rate": 0.1 * step} for step in (1, 2, 3)]
            rows[1][metric] = 0.3 * seed
            write_lines(folder / stage / "metrics.jsonl", rows)
        for name in ("eval-untrained", "eval-stage1-6", "eval-stage2-16"):
            evaluation(folder / name, [episode(0)])
            results = measure_by_dataset([episode_record(episode(i)) for i in range(2)])
            text = json.dumps({"protocol": {}, "results": results})
            (folder / name / "metrics.json").write_text(text)
    runs = []
    for folder in folders:
        first, second = report.read_batches([folder / stage for stage in report.STAGES])
        assert (list(first), list(second)) == ([1, 2, 3], [4, 5, 6])
        runs.append(first | second)

    from matplotlib import pyplot

    _, axis = pyplot.subplots()
    report.draw_band(axis, runs, metric, label="who")
    (line,), (band,) = axis.lines, axis.collections
    assert line.get_xydata().tolist() == [[2, pytest.approx(0.3)], [5, pytest.approx(0.3)]]
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0, 0.6)
    out = tmp_path / "l.png"
    report.main(["learning", *map(str, folders), "--out", str(out)])
    assert out.read_bytes()[:4] == b"\x89PNG"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| F1 of held-out questions | seed0 | seed1 | seed2 | mean |"
    cell = "1.000 (1.00-1.00)"
    assert f"| after stage 2, d | {cell} | {cell} | {cell} | 1.000 |" in lines
    assert "no folder" in refused(capsys, "learning")
    unmade = tmp_path / "unmade.png"
    write_lines(folders[1] / "stage1" / "metrics.jsonl", [{"step": 1}])
    error = refused(capsys, "learning", *folders, "--out", unmade)
    assert "different numbers of steps" in error and not unmade.exists()
    shutil.rmtree(folders[1] / "eval-stage2-16")
    error = refused(capsys, "learning", *folders, "--out", unmade)
    assert "seed1: no eval-stage2-*" in error and not unmade.exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser(tmp_path):
    passages = [replace_surrogates(text) for text in HOSTILE]  # --dump-dom gives up on surrogates
    run = evaluation(tmp_path / "eval", [episode(i, text) for i, text in enumerate(passages)])
    write_page(tmp_path / "r.html", run)
    flags = """
        --headless --dump-dom --no-sandbox --no-first-run --disable-gpu --disable-quic
        --disable-background-networking --disable-component-update --disable-sync
    """
    for number, passage in enumerate(passages, 1):
        url = (tmp_path / "r.html").as_uri() + f"#t={number}&filter=right"
        profile = f"--user-data-dir={tmp_path / str(number)}"
        command = ["chromium", *flags.split(), profile, url]
        page = subprocess.run(command, capture_output=True, timeout=300).stdout.decode()
        shown = page.split("<main>")[1].split("</main>")[0]
        assert f"{number} of {len(HOSTILE)}" in shown
        assert "<title>eval · nanosearcher</title>" in page
        assert len(Page(page).scripts) == 2 and "<img" not in shown and "<script" not in shown
        documents = shown.split('class="segment documents"')[1]
        assert ("show all" in documents) == (len(passage) > 3000)
        assert len(shown) < 60_000

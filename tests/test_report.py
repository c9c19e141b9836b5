import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import yaml

from potstill.data.show import ShownRow, ShownToken
from potstill.errors import DataError
from potstill.evaluate.report import canvas, pictures
from potstill.evaluate.report.page import write_report, write_rows, write_student_card
from potstill.evaluate.verdict import verdict

VOID = {"meta", "link", "br", "hr", "img", "input"}


def row(loss, **others):
    return {"loss": loss, "perplexity": math.exp(loss), **others}


def full_summary():
    return {
        "name": "stdlib",
        "seed": 0,
        "created": "2026-11-22T03:00:00+00:00",
        "rows": {
            "teacher": row(2.31, agreement=1.0, kl=0.0, parameters=5270784, bytes=10541568, latency_ms=21.0),
            "baseline": row(3.303, agreement=0.512, kl=1.113, parameters=1284736, bytes=2569472, latency_ms=6.4),
            "student": row(2.856, agreement=0.613, kl=0.642, parameters=1284736, bytes=2569472, latency_ms=3.24),
        },
        "gap_closed": 0.45,
        "kl_by_position": {"edges": [0, 16, 32, 48], "baseline": [2.0, 1.5, None], "student": [1.0, 0.7, 0.6]},
        "continuations": [
            {
                "prompt": "def first(x):\n    return ",
                "truth": "x[0]\n",
                "teacher": "x[0]  # <script>alert(1)</script>",
                "baseline": 'x</pre><img src="https://example.org/x.png" onerror="alert(2)">',
                "student": "x[\x00-1]\n\n    and    spaces & more \ud800",
            }
        ],
        "data": {
            "train_tokens": 200000,
            "train_examples": 800,
            "eval_tokens": 110000,
            "eval_examples": 430,
            "train": "train.jsonl",
            "eval": "eval.jsonl",
        },
        "training": {"steps": 600, "tokens_per_step": 2048, "seconds": {"baseline": 40.1, "student": 85.0}},
        "objective": "forward_kl at temperature 1, weight 1",
        "models": {"teacher": "demo teacher", "student": "llama, 4 layers of width 128"},
        "notes": ["tokenizer has no pad token: its EOS token is used."],
        "versions": {"potstill": "0.1.0", "python": "3.11.7", "machine": "Linux x86_64, 2 cores"},
    }


def metrics(runs=("baseline", "student"), steps=6):
    lines = []
    for run in runs:
        for step in range(100, 100 * steps + 1, 100):
            loss = 3.0 + math.exp(-step / 150)
            lines.append({"run": run, "step": step, "loss": loss, "learning_rate": 1e-3, "logits": loss})
            lines.append({"run": run, "step": step, "eval_loss": loss, "eval_cross_entropy": loss + 0.1})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def summary():
    return full_summary()


@pytest.fixture
def run_directory(tmp_path):
    def make(summary, records=None, recipe="name: stdlib\nnote: <b>1 & 2</b>\n"):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        (tmp_path / "metrics.jsonl").write_text(metrics() if records is None else records)
        (tmp_path / "recipe.yaml").write_text(recipe)
        (tmp_path / "student").mkdir(exist_ok=True)
        return tmp_path

    return make


class Page(HTMLParser):
    """The page's elements, its visible text, and a complaint where a tag closes another."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def report_of(directory):
    path = write_report(directory)
    assert path == directory / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.mark.parametrize(
    ("curve", "measured", "caption"),
    [(430, 430, None), (128, 430, "128 of the held-out rows; the table uses all of them."), (128, 200, "uses 200.")],
)
def test_the_rows_of_the_curves_are_those_of_the_table_or_named(run_directory, summary, curve, measured, caption):
    summary["curve"] = {"rows": curve}
    summary["data"]["eval_measured"] = measured
    text = report_of(run_directory(summary)).text
    assert "of the held-out rows; the table" not in text if caption is None else caption in text


def test_the_page_has_all_its_parts(run_directory, summary):
    page = report_of(run_directory(summary))
    assert page.all("html") == [{"lang": "en"}]
    for text in (
        verdict(summary),
        *("4.1×", "45%", "61.3%", "6.5×"),
        *("2.856", "17.4", "5.3M", "10.5 MB", "3.2 ms", "(3.303 − 2.856) / (3.303 − 2.310) = 45%"),
        *("How it learned", "Where it follows the teacher", "How it writes", "What was run", "Notes"),
        *("in 2 of 2 parts", "200K tokens in 800 examples", "6.1 passes", "1 min 25 s", "22 November 2026"),
        *("llama, 4 layers of width 128", "its EOS token is used", "Linux x86_64", "<b>1 & 2</b>"),
    ):
        assert text in page.text, text


def test_the_page_needs_nothing_from_outside(run_directory, summary):
    page = report_of(run_directory(summary))
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attributes)
    assert not page.all("script")
    source = (run_directory(summary) / "report.html").read_text()
    assert "@import" not in source
    assert not re.findall(r"url\((?!#)", source)


def test_what_the_models_wrote_is_text(run_directory, summary):
    summary["name"] = summary["notes"][0] = summary["versions"]["python"] = "<script>alert(3)</script>"
    page = report_of(run_directory(summary))
    assert not page.all("script") and not page.all("img")
    assert "x[0]  # <script>alert(1)</script>" in page.text
    assert "x[\N{REPLACEMENT CHARACTER}-1]\n\n    and    spaces & more ?" in page.text


def test_the_page_shows_what_was_trained_on(run_directory, summary):
    directory = run_directory(summary)
    assert "What it was trained on" not in report_of(directory).text
    tokens = tuple(ShownToken(i, text, i > 0, 0.5) for i, text in enumerate(("<user>", "a\n", "<b>")))
    write_rows([ShownRow(1, tokens, teacher=tokens[:1])], directory)
    page = report_of(directory)
    assert "Row 1: 3 tokens, 2 targets" in page.text and "What the teacher reads" in page.text
    assert "<user>|0.5: a⏎\n|<b>" in page.text
    assert {"class": "prompt"} in page.all("span")


def test_the_table_can_be_read_aloud(run_directory, summary):
    page = report_of(run_directory(summary))
    scopes = [attributes.get("scope") for attributes in page.all("th")]
    assert scopes == ["col"] * 4 + ["row"] * 7


def test_pictures_are_labelled_and_share_no_ids(run_directory, summary):
    page = report_of(run_directory(summary))
    drawn = [attributes for attributes in page.all("svg") if attributes.get("class") == "picture"]
    assert len(drawn) == 3
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawn)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for value in attributes.values():
            for target in re.findall(r"url\(#([^)]*)\)", value or ""):
                assert target in ids


def test_pictures_take_the_colours_and_the_typeface_of_the_page():
    curves = {"baseline": [(100, 4.5), (200, 3.3)], "student": [(100, 4.2), (200, 2.86)]}
    picture = pictures.curves("held-out", "Held-out cross-entropy", curves, 2.31)
    assert picture == pictures.curves("held-out", "Held-out cross-entropy", curves, 2.31)
    assert set(re.findall(r"var\(--(\w+)\)", picture)) == {"muted", "rule", "paper", "teacher", "baseline", "student"}
    assert not re.findall(r"#[0-9a-f]{6}\b", picture)
    assert "DejaVu" not in picture and "<style" not in picture and "http" not in picture
    ET.fromstring(picture.replace("xlink:href", "href"))


def test_labels_of_lines_that_end_together_do_not_touch():
    curves = {"baseline": [(1, 5.0), (2, 3.0)], "student": [(1, 5.0), (2, 3.0)]}
    picture = pictures.curves("held-out", "Held-out cross-entropy", curves, 3.0)
    heights = [float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>(?:teacher|baseline|student) 3\.00<', picture)]
    assert len(heights) == 3
    first, second, third = sorted(heights)
    assert second - first > 10 and third - second > 10


def test_a_long_run_is_thinned():
    curve = [(step, 3.0 + 0.01 * (step % 7)) for step in range(10_000)]
    picture = pictures.curves("training", "Training loss", {"student": canvas.thin(curve)}, markers=1)
    assert len(picture) < 40_000


def test_a_random_start_is_another_row(run_directory, summary):
    summary["rows"]["random"] = row(5.25, agreement=0.2, kl=3.1, parameters=1284736)
    summary["kl_by_position"]["random"] = [3.0, 3.0, None]
    directory = run_directory(summary, records=metrics(("random", "baseline", "student")))
    page = report_of(directory)
    assert "Bold: the best of random, baseline and student." in page.text
    assert "Random is the same student from random weights" in page.text
    assert "From random weights it reaches 5.250." in verdict(summary)
    assert page.text.count("random 3.12") == 1  # the end of its curve
    assert (
        "5.250" not in page.text.split("How good it is")[0].split("right is better")[0].split("weights it reaches")[0]
    )
    body = write_student_card(directory).read_text()
    assert "| Held-out loss | 2.310 | 5.250 | 3.303 | **2.856** |" in body
    assert "- Random: the same student from random weights, trained as the student was." in body


def test_a_speedup_within_the_spread_is_called_so(run_directory, summary):
    times = {"median_ms": 21.0, "low_ms": 9.0, "high_ms": 107.0, "passes": 15}
    summary["latency"] = {"teacher": times, "student": times | {"median_ms": 3.24, "low_ms": 3.1, "high_ms": 8.9}}
    assert "within the spread" not in report_of(run_directory(summary)).text
    summary["latency"]["student"]["high_ms"] = 9.1
    assert "faster, within the spread" in report_of(run_directory(summary)).text


def test_no_baseline(run_directory, summary):
    del summary["rows"]["baseline"], summary["kl_by_position"]["baseline"], summary["continuations"][0]["baseline"]
    summary["gap_closed"] = None
    page = report_of(run_directory(summary, records=metrics(runs=["student"])))
    assert "of the gap closed" not in page.text
    assert "without a baseline run it is unknown" in page.text
    assert [attributes.get("scope") for attributes in page.all("th")] == ["col"] * 3 + ["row"] * 7


def test_little_is_enough(run_directory):
    page = report_of(run_directory({"rows": {"student": {"loss": 2.5}}}, records=""))
    assert "The student reaches 2.500 nats" in page.text
    for left_out in ("How it learned", "Where it follows", "How it writes", "Notes"):
        assert left_out not in page.text
    card = write_student_card(run_directory({"rows": {"student": {"loss": 2.5}}})).read_text()
    assert "| Held-out loss | 2.500 |" in card


def test_a_value_that_was_not_measured_is_a_dash(run_directory, summary):
    summary["rows"]["teacher"]["latency_ms"] = None
    page = report_of(run_directory(summary))
    assert "–" in page.text and "faster" not in page.text


def test_unfinished_last_line_and_repeated_steps(run_directory, summary):
    again = json.dumps({"run": "student", "step": 600, "eval_cross_entropy": 1.25}) + "\n"
    directory = run_directory(summary, records=metrics() + again + '{"run": "student", "st')
    label = next(a["aria-label"] for a in report_of(directory).all("svg") if "Held-out" in a.get("aria-label", ""))
    assert "student from 3.61 to 1.25" in label


def test_losses_that_are_not_numbers(run_directory, summary):
    summary["rows"]["student"] = {"loss": None, "perplexity": math.nan}
    directory = run_directory(summary, records='{"run": "student", "step": 1, "loss": NaN}\n')
    assert "diverged" in report_of(directory).text


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl", "recipe.yaml"])
def test_a_missing_file_is_named(run_directory, summary, missing):
    directory = run_directory(summary)
    (directory / missing).unlink()
    with pytest.raises(DataError, match=rf"^report: expected {re.escape(missing)} in .*\.$") as caught:
        write_report(directory)
    assert "\n" not in str(caught.value)
    assert not (directory / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("summary.json", '{"rows": {"student": {"lo', "breaks off or is not JSON at line 1"),
        ("summary.json", "[]", "expected a usable an object"),
        ("summary.json", '{"rows": {}}', "expected a usable rows.student"),
        ("summary.json", '{"rows": {"student": {"loss": "low"}}}', "expected a usable rows.student.loss .* got 'low'"),
        (
            "summary.json",
            '{"rows": {"student": {"loss": 1}}, "kl_by_position": {"edges": [0], "student": [1]}}',
            "one edge more than values, got 1 and 1",
        ),
        ("metrics.jsonl", '{"run": "student", "st\n{"run": "student", "step": 2}\n', "line 1"),
        ("metrics.jsonl", "[1, 2]\n\n", "line 1"),
    ],
)
def test_a_broken_file_is_one_line(run_directory, summary, file, text, complaint):
    directory = run_directory(summary)
    (directory / file).write_text(text)
    with pytest.raises(DataError, match=complaint) as caught:
        write_report(directory)
    assert str(caught.value).startswith("report: expected ") and "\n" not in str(caught.value)


def test_text_that_is_not_utf8(run_directory, summary):
    directory = run_directory(summary)
    (directory / "recipe.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(DataError, match="expected a readable text file"):
        write_report(directory)


def test_a_failure_leaves_the_old_page_and_nothing_else(run_directory, summary):
    directory = run_directory(summary)
    before = write_report(directory).read_bytes()
    assert write_report(directory).read_bytes() == before
    (directory / "summary.json").write_text("{")
    with pytest.raises(DataError):
        write_report(directory)
    assert (directory / "report.html").read_bytes() == before
    names = {path.name for path in directory.iterdir()}
    assert names == {"summary.json", "metrics.jsonl", "recipe.yaml", "student", "report.html"}


def test_the_card(run_directory, summary):
    directory = run_directory(summary)
    path = write_student_card(directory)
    assert path == directory / "student" / "README.md"
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["distillation", "potstill"]
    assert (
        "\n| | teacher | baseline | student |\n|---|---:|---:|---:|\n| Held-out loss | 2.310 | 3.303 | **2.856** |\n"
        in body
    )
    assert "| Latency | 21.0 ms | 6.4 ms | 3.2 ms |\n" in body
    assert verdict(summary) in body
    assert "AutoModelForCausalLM.from_pretrained" in body
    for heading in ("How good it is", "What it was compared with", "How it was made", "How to load it", "Limits"):
        assert f"\n## {heading}\n" in body
    assert "script" not in body and "\n\n\n" not in body


def test_the_card_keeps_markdown_out_of_names(run_directory, summary):
    summary["name"] = "a|b\n# *c*"
    body = write_student_card(run_directory(summary)).read_text()
    assert "# a\\|b # \\*c\\*\n" in body


def test_no_card_without_a_student(run_directory, summary):
    directory = run_directory(summary)
    (directory / "student").rmdir()
    with pytest.raises(DataError, match="expected a saved student"):
        write_student_card(directory)


def verdict_of(teacher, baseline, student, gap_closed=None):
    losses = {"teacher": teacher, "baseline": baseline, "student": student}
    rows = {model: {"loss": loss, "parameters": 100} for model, loss in losses.items() if loss is not None}
    if "teacher" in rows:
        rows["teacher"]["parameters"] = 410
    if gap_closed is None and teacher is not None and baseline is not None and teacher < baseline:
        gap_closed = (baseline - student) / (baseline - teacher)
    sentence = verdict({"rows": rows, "gap_closed": gap_closed})
    assert sentence.endswith(".") and "\n" not in sentence and "nan" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("losses", "phrases"),
    [
        ((2.31, 3.303, 2.856), ["closes 45% of the gap", "4.1 times fewer parameters", "2.856", "3.303", "2.310"]),
        ((2.31, 3.303, 3.27), ["only slightly better than the baseline", "3% of the gap", "may be chance"]),
        ((3.29, 3.303, 3.295), ["only slightly better", "may be chance"]),
        ((2.31, 9.9, 9.2), ["only slightly better", "9% of the gap", "more steps"]),
        ((2.31, 3.303, 3.41), ["worse than the baseline", "did not help", "try "]),
        ((2.31, 3.303, 3.306), ["slightly worse than the baseline", "try "]),
        ((2.31, 3.303, 3.303), ["made no difference", "3.303"]),
        ((2.31, None, 2.856), ["within 0.546 nats of the teacher", "no baseline was run", "cannot be measured"]),
        ((2.31, None, 2.2), ["better than its own teacher", "no baseline was run"]),
        ((None, None, 2.2), ["reaches 2.200 nats", "no baseline was run"]),
        ((None, 3.303, 2.856), ["better than the baseline"]),
        ((2.31, math.nan, 2.856), ["the baseline diverged"]),
        ((2.31, 3.303, 2.25), ["better than its own teacher", "2.250 against 2.310", "stronger"]),
        ((3.4, 3.303, 3.2), ["the teacher (3.400 nats) is not", "no gap to close", "stronger teacher"]),
        ((3.4, 3.303, 3.35), ["worse than the baseline"]),
        ((2.31, 3.303, math.inf), ["not a number", "diverged"]),
    ],
)
def test_the_verdict_is_honest(losses, phrases):
    sentence = verdict_of(*losses)
    for phrase in phrases:
        assert phrase in sentence


def test_a_student_with_fewer_tokens_is_compared_with_the_size_of_the_whole_teacher(run_directory, summary):
    whole = 2 * summary["rows"]["teacher"]["parameters"]
    summary["rows"]["whole_teacher"] = {"loss": 2.2, "parameters": whole}
    ratio = f"{whole / summary['rows']['student']['parameters']:.1f}"
    page = write_report(run_directory(summary)).read_text()
    assert f"{ratio} times fewer parameters" in page
    assert f'<dt>smaller</dt><dd class="value">{ratio}×</dd>' in page


@pytest.mark.parametrize(
    ("whole", "phrase"), [(2.2, "With all its tokens the teacher has 2.200."), (2.4, "its own teacher, 2.250")]
)
def test_a_teacher_that_is_surpassed_may_be_better_with_all_its_tokens(whole, phrase):
    rows = {name: {"loss": loss} for name, loss in (("teacher", 2.5), ("baseline", 3.0), ("student", 2.25))}
    assert phrase in verdict({"rows": rows | {"whole_teacher": {"loss": whole}}})


@pytest.mark.parametrize(
    ("student", "error", "phrase"),
    [
        (2.9, 0.06, "better than the baseline, 2.900 against 3.000 nats held out, by less than two standard errors"),
        (3.1, 0.06, "worse than the baseline"),
        (2.9, 0.04, "closes 20% of the gap"),
    ],
)
def test_a_difference_within_its_error_is_no_conclusion(student, error, phrase):
    rows = {name: {"loss": loss} for name, loss in (("teacher", 2.5), ("baseline", 3.0), ("student", student))}
    sentence = verdict({"rows": rows, "gain_error": error})
    assert phrase in sentence
    assert ("too few to tell them apart" in sentence) == (error > 0.05)


def test_the_verdict_needs_a_student():
    with pytest.raises(DataError, match=r"rows\.student"):
        verdict({"rows": {"teacher": {"loss": 2.0}}})


def test_the_verdict_leaves_the_summary_alone(summary):
    before = copy.deepcopy(summary)
    verdict(summary)
    assert summary == before

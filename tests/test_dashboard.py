"""What TensorBoard serves of a run, and what a browser shows of it."""

import asyncio
import base64
import contextlib
import inspect
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import column, metrics_of
from lightning.pytorch.loggers import Logger, WandbLogger

from src.callbacks.tensorboard import TensorBoard
from src.cli.overrides import CONF

COMMAND = re.search(r"^tensorboard --logdir outputs (.*)$", (CONF.parent / "README.md").read_text(), re.M)[1]
SCREENSHOTS = CONF.parent / "outputs" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def tensorboard(logdir: Path):
    """The address of a server of the README's command, for ``logdir``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", *COMMAND.split()]
    server = subprocess.Popen([*command, f"--port={port}", "--host=127.0.0.1"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        runs = {path.parent for path in logdir.rglob("events.out.tfevents.*")}
        for _ in range(120):
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                if len(get(f"http://127.0.0.1:{port}", "plugin/scalars/tags")) == len(runs):
                    break
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def get(address: str, path: str, **query):
    data = json.dumps(query).encode() if query else None
    request = urllib.request.Request(f"{address}/data/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


@pytest.fixture
def outputs(tiny_run, tmp_path):
    """Two runs of a sweep, in ``outputs/gpt2``."""
    runs = [
        tiny_run("trainer.max_steps=6", "eval.every_steps=2", "eval.batches=1", f"optimizer.learning_rate={rate}",
                 folder=tmp_path / "outputs" / "gpt2" / f"run {rate}")
        for rate in ("0.0011", "0.0037")
    ]  # fmt: skip
    return tmp_path / "outputs", runs


def test_tensorboard_serves_everything(outputs):
    folder, (first, second) = outputs
    with tensorboard(folder) as address:
        scalars = get(address, "plugin/scalars/tags")
        assert set(scalars) == {"gpt2/run 0.0011", "gpt2/run 0.0037"}
        tags = set(scalars["gpt2/run 0.0011"])
        assert tags - {"speed/mfu"} == {
            "loss/train", "loss/val", "perplexity/train", "perplexity/val", "perplexity/val_bits_per_byte",
            "speed/tokens_per_second", "training/learning_rate", "training/loss", "training/grad_norm",
            "vs_tokens/loss_train", "vs_tokens/loss_val", "vs_tokens/training_loss",
        }  # fmt: skip
        curve = get(address, "plugin/scalars/scalars?tag=loss%2Fval&run=gpt2%2Frun%200.0011")
        assert [(step, round(loss, 4)) for _, step, loss in curve] == [
            (row["step"], round(row["val/loss"], 4)) for row in metrics_of(first) if "val/loss" in row
        ]
        over_tokens = get(address, "plugin/scalars/scalars?tag=vs_tokens%2Ftraining_loss&run=gpt2%2Frun%200.0011")
        assert [step for _, step, _ in over_tokens] == [32 * step for step in range(1, 7)]
        assert [loss for *_, loss in over_tokens] == pytest.approx(column(first, "train/loss"))
        assert set(get(address, "plugin/images/tags")["gpt2/run 0.0037"]) == {"plots/loss", "plots/perplexity"}
        (layout,) = get(address, "plugin/custom_scalars/layout")["category"]
        assert {chart["title"]: chart["multiline"]["tag"] for chart in layout["chart"]}["loss over steps"] == ["^loss/"]

        experiment = get(address, "plugin/hparams/experiment", experimentName="")
        names = [info["name"] for info in experiment["hparamInfos"]]
        assert names[0] == "optimizer.learning_rate"  # what differs between the runs
        assert {"data.batch_size", "data.path", "parameters", "schedule.name", "seed", "tokens_per_step"} < set(names)
        assert {"model.n_layers", "trainer.max_steps"} < set(names)  # not as in conf
        assert not {name for name in names if name.startswith(("eval", "checkpoint", "callbacks", "activation"))}
        assert [info["name"]["tag"] for info in experiment["metricInfos"]][:4] == [
            "loss/train", "loss/val", "perplexity/train", "perplexity/val",
        ]  # fmt: skip
        groups = get(address, "plugin/hparams/session_groups", experimentName="", startIndex=0, sliceSize=9,
                     colParams=[], allowedStatuses=["STATUS_RUNNING", "STATUS_SUCCESS", "STATUS_UNKNOWN"])  # fmt: skip
        for group, run in zip(groups["sessionGroups"], (first, second), strict=True):
            values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
            assert values["loss/val"] == pytest.approx(run.record["val_loss"], rel=1e-5)
            assert values["perplexity/val"] == pytest.approx(run.record["val_perplexity"], rel=1e-5)
            assert group["hparams"]["parameters"] == run.record["parameters"]
            assert group["hparams"]["tokens_per_step"] == 32


def test_texts_and_images_of_every_step(tmp_path):
    import numpy as np

    logger = TensorBoard(tmp_path / "outputs" / "run")
    logger.log_metrics({"val/loss": 1.0}, 0)
    for step in range(30):
        logger.log_text("samples", columns=["text"], data=[[f"text {step}"]], step=step)
        logger.log_image("plots/loss", [np.zeros((4, 4, 3))], step=step)
    logger.finalize("success")
    with tensorboard(tmp_path / "outputs") as address:
        texts = get(address, "plugin/text/text?run=run&tag=samples%2Ftext_summary")
        assert [text["step"] for text in texts] == list(range(30))
        images = get(address, "plugin/images/images?run=run&tag=plots%2Floss&sample=0")
        assert [image["step"] for image in images] == list(range(30))


class WandbLike(Logger):
    """Takes plots and texts by the methods that Lightning's WandbLogger has, which needs an account."""

    name = version = "wandb"
    calls: ClassVar[list] = []

    def __init__(self, save_dir):
        super().__init__()
        self.calls.clear()

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_image(self, *args, **kwargs):
        self.calls.append(inspect.signature(WandbLogger.log_image).bind(self, *args, **kwargs).arguments)

    def log_text(self, *args, **kwargs):
        self.calls.append(inspect.signature(WandbLogger.log_text).bind(self, *args, **kwargs).arguments)


def test_another_logger_gets_plots_and_texts(tiny_run):
    tiny_run("trainer.max_steps=1", "+logger.mine._target_=test_dashboard.WandbLike")
    texts = [call for call in WandbLike.calls if call["key"] == "samples"]
    assert [text["step"] for text in texts] == [0, 1]
    for text in texts:
        ((entry,),) = text["data"]
        assert len(text["columns"]) == 1
        assert entry.count("Every effort moves you") == 2
    images = {call["key"]: call["images"] for call in WandbLike.calls if call not in texts}
    assert set(images) == {"plots/loss", "plots/perplexity"}
    assert [image.shape for image in images["plots/loss"]] == [(840, 960, 3)]


def test_resumed_twice_before_the_eyes_of_a_server(tmp_path):
    """Each time killed in the middle of a record; the curves go on behind steps 3 and 5."""
    expected = []
    with contextlib.ExitStack() as stack:
        for first in 1, 4, 6:
            logger = TensorBoard(tmp_path / "run")
            if first > 1:
                logger.resume(first - 1)
            logger.log_hyperparams({"seed": first})
            for step in range(first, first + 6):
                logger.log_metrics({"train/loss": 100 * first + step, "tokens_seen": 10 * step}, step)
            logger.finalize("failed")
            with max(tmp_path.glob("run/events*"), key=lambda path: path.name).open("ab") as file:
                file.write(b"\x20\0\0\0\0\0\0\0\1")
            expected = expected[: first - 1] + [100 * first + step for step in range(first, first + 6)]
            if first == 1:
                address = stack.enter_context(tensorboard(tmp_path))
            for _ in range(60):
                steps, tokens = (
                    get(address, f"plugin/scalars/scalars?run=run&tag={tag}")
                    for tag in ("training%2Floss", "vs_tokens%2Ftraining_loss")
                )
                if [value for *_, value in tokens] == expected:
                    break
                time.sleep(0.5)
            assert [(step, value) for _, step, value in steps] == list(enumerate(expected, 1))
            assert [(step, value) for _, step, value in tokens] == [(10 * n, v) for n, v in enumerate(expected, 1)]
    assert len(list(tmp_path.glob("run/events*"))) == 2  # what was kept, and what came since


# All that is written on the page, inside of its web components too.
TEXT = """(function text(node) {
    if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName)) return "";
    const children = [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes];
    return (node.nodeType == 3 ? node.textContent + " " : "") + children.map(text).join("");
})(document.body)"""


@contextlib.contextmanager
def chromium(profile: Path):
    """The port of a browser's DevTools."""
    options = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    browser = subprocess.Popen([CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        announced = profile / "DevToolsActivePort"
        for _ in range(120):
            time.sleep(0.5)
            if announced.exists() and announced.read_text():
                break
        yield announced.read_text().splitlines()[0]
    finally:
        browser.terminate()
        browser.wait()


def missing(text: str, expected: list[str | float]) -> list[str | float]:
    """Those of ``expected`` that a page's ``text`` lacks; a number is there if one on the page is within 1e-3."""
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", text)]
    near = lambda value: any(abs(number - value) < 1e-3 for number in numbers)  # noqa: E731
    return [part for part in expected if not (part in text if isinstance(part, str) else near(part))]


async def look(port: str, address: str, pages: dict[str, list[str | float]]) -> dict[str, str]:
    """The text of each page once all that is asked for is on it, or after a minute; and its screenshot."""
    import aiohttp

    numbers = itertools.count(1)
    async with aiohttp.ClientSession() as session:
        targets = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
        tab = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
        async with session.ws_connect(tab, max_msg_size=0) as devtools:

            async def call(method: str, **params):
                number = next(numbers)
                await devtools.send_json({"id": number, "method": method, "params": params})
                while (answer := await devtools.receive_json()).get("id") != number:
                    pass
                return answer["result"]

            await call("Emulation.setDeviceMetricsOverride", width=1400, height=900, deviceScaleFactor=1, mobile=False)
            found = {}
            for page, expected in pages.items():
                for second in range(60):
                    if second % 20 == 0:
                        await call("Page.navigate", url="about:blank")
                        await call("Page.navigate", url=f"{address}/#{page}")
                    await asyncio.sleep(1)
                    text = (await call("Runtime.evaluate", expression=TEXT))["result"].get("value", "")
                    found[page] = " ".join(text.split()).replace(" /", "/")  # which a name may be broken before
                    if not missing(found[page], expected):
                        break
                await asyncio.sleep(2)  # for the curves to be drawn
                picture = await call("Page.captureScreenshot")
                (SCREENSHOTS / f"{page}.png").write_bytes(base64.b64decode(picture["data"]))
            return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")
def test_looked_at_in_a_browser(outputs, tmp_path):
    """Screenshots are left in outputs/screenshots."""
    folder, runs = outputs
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    names = [f"gpt2/{run.folder.name}" for run in runs]
    losses = [run.record["val_loss"] for run in runs]
    greedy = re.findall(r"^> (Every effort moves you.*)$", (runs[0].folder / "samples.md").read_text(), re.M)[-2]
    pages = {
        "timeseries": [*names, *losses, "loss/train", "loss/val", "perplexity/val", "2 cards"],
        "scalars": [*names, "tag: loss/train", "tag: loss/val"],
        "custom_scalars": [*names, "loss over steps", "loss over tokens", "perplexity over steps"],
        "text": [*names, "samples", greedy[:60]],
        "images": [*names, "plots/loss", "plots/perplexity"],
        "hparams": [*names, *losses, "optimizer.learning_rate", "0.0011000", "0.0037000", "loss/val"],
    }
    with tensorboard(folder) as address, chromium(tmp_path / "profile") as port:
        found = asyncio.run(look(port, address, pages))
    assert {page: missing(found[page], expected) for page, expected in pages.items()} == {page: [] for page in pages}
    assert f"{names[0]}/" not in found["timeseries"]  # nothing behind the run's own name
    assert "tag: epoch" not in found["scalars"]
    assert all((SCREENSHOTS / f"{page}.png").stat().st_size > 20_000 for page in pages)

"""The command line as tests run it, in this process, and a manifest to show on it."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from evla_compile import cli
from evla_compile.artifact.manifest import Manifest
from evla_compile.artifact.records import FileRecord, Part, TensorSpec
from evla_compile.host.processor import ActionStatistics
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: str | int | None
    out: str
    err: str

    @property
    def words(self) -> str:
        """Standard output, its lines joined."""
        return " ".join(self.out.split())

    @property
    def message(self) -> str:
        """Standard error, its lines joined."""
        return " ".join(self.err.split())


def evla(*arguments: object, columns: int = 80) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evla", *map(str, arguments)])
        patch.setenv("COLUMNS", str(columns))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main()
    return Outcome(status=end.value.code, out=out.getvalue(), err=err.getvalue())


def refused(outcome: Outcome) -> str:
    """Return the one message of a refusal."""
    assert outcome.status == 2
    assert not outcome.out
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error:") == 1
    return outcome.message.partition("error: ")[2]


def example_manifest(*, dataset: str = "toy", versions: str = "2.13.0") -> Manifest:
    """Return a manifest that a reader accepts; of its files only the names matter."""
    config = CompileConfig.dense(text_tokens=8)
    inputs = (
        TensorSpec(name="image", dtype="uint8", shape=(1, 28, 28, 3)),
        TensorSpec(name="input_ids", dtype="int64", shape=(1, 8)),
        TensorSpec(name="text_length", dtype="int64", shape=(1,)),
        TensorSpec(name="noise", dtype="float32", shape=(1, 16, 7)),
    )
    outputs = (TensorSpec(name="samples", dtype="float32", shape=(1, 16, 7)),)
    files = {
        name: FileRecord(name=name, sha256="0" * 64, size=1)
        for name in ("model.onnx", "tokenizer.json", "report.json", "cases.npz")
    }
    return Manifest(
        created_by="0.0.0",
        parts=(Part(name="policy", model=files["model.onnx"], data=(), inputs=inputs, outputs=outputs),),
        engine=None,
        precision="float32",
        tokenizer=files["tokenizer.json"],
        report=files["report.json"],
        cases=files["cases.npz"],
        inputs=inputs,
        outputs=outputs,
        config=config,
        plan=Plan(decisions=(LayerDecision(keep=(0,)),)),
        statistics={dataset: ActionStatistics(low=(-1.0,) * 7, high=(1.0,) * 7)},
        vocabulary=32064,
        pad_id=3,
        opset=23,
        versions={"torch": versions},
    )

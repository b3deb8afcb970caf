"""`convit plan`."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from runs import ROOT
import small_models

from convit_jax import ConViT
from convit_jax.cli import options, plan
from convit_jax.model.flops import forward_flops
from convit_jax.parallel import sharding
from convit_jax.plan import arithmetic, attempts, collectives, compiled, settle, topology
from convit_jax.plan.arithmetic import Arithmetic
from convit_jax.train import setup
from convit_jax.train import teacher as teachers
from convit_jax.weights import safetensors
from convit_jax.weights.loaded import Loaded

# The step of a pod test, and one that compiles in seconds.
POD = (
    "--config=configs/convit_b.py", "--config.model.image_size=32", "--config.model.embed_dim=128",
    "--config.model.num_heads=4", "--config.model.depth=2", "--config.model.local_up_to_layer=1",
    "--config.model.num_classes=128", "--config.train.batch_size=64", "--config.mixup.mixup=0",
    "--config.mixup.cutmix=0", "--config.mixup.erase_prob=0",
)  # fmt: skip
TINY = (
    "--config=convit_ti", "--config.model.image_size=32", "--config.model.embed_dim=32",
    "--config.model.depth=1", "--config.model.local_up_to_layer=0",
    "--config.model.num_classes=10", "--config.train.batch_size=16", "--config.mixup.mixup=0",
    "--config.mixup.cutmix=0", "--config.mixup.erase_prob=0", "--config.train.remat=none",
)  # fmt: skip


def test_the_devices_here_have_a_plan(capsys, monkeypatch, tmp_path):
    analyses, read = [], compiled.Memory.of
    monkeypatch.setattr(compiled.Memory, "of", lambda a: (analyses.append(a), read(a))[1])
    file = tmp_path / "plan.json"
    flags = ("--backend=cpu", "--peak_tflops=0.5", "--bandwidth=20", f"--json={file}")
    assert plan.main([*TINY, *flags, "--config.train.epochs=2", "--chips_per_host=4"]) == 0
    found, text = json.loads(file.read_text()), capsys.readouterr().out
    (step,) = found["steps"]

    (stats,), memory = analyses, step["memory"]
    assert memory["arguments"] == stats.argument_size_in_bytes
    assert memory["temporaries"] == stats.temp_size_in_bytes
    assert memory["total"] == memory["results"] + sum(
        memory[kind] for kind in ("arguments", "temporaries", "program")
    )
    assert f"{memory['total'] / 2**20:,.0f}" in text

    assert [c["kind"] for c in step["collectives"]] == ["all-reduce"] * len(step["collectives"])
    assert step["unexpected"] == []
    # Of the patch embedding, the model's count has the gradient of the images too, for 2 of them.
    unneeded = 2 * 2 * 32 * 32 * 3 * 32
    assert step["flops"] == pytest.approx(step["model_flops"] - unneeded, rel=0.01)
    bound = step["bound"]
    seconds = max(step["flops"] / 0.5e12, step["bytes_moved"] / 20e9)
    assert bound["images_per_second"] == pytest.approx(16 / seconds)
    steps = 2 * 1_281_167 / 16
    assert bound["device_hours"] == pytest.approx(8 * steps * seconds / 3600, rel=1e-3)
    assert bound["host_images_per_second"] == pytest.approx(8 / seconds)  # two hosts
    assert "2 hosts" in text
    assert step["xla_bytes_accessed"] > 0
    assert "at 536 images/s" in text


def test_a_teachers_share_is_counted(tmp_path):
    """Its forward pass on every image, its parameters on every device, and what is gathered."""
    teacher = ConViT(
        image_size=32, patch_size=8, embed_dim=64, depth=2, local_up_to_layer=1, num_classes=12
    )
    path = tmp_path / "teacher.safetensors"
    safetensors.save_weights(path, Loaded(teacher, small_models.random_params(teacher)))
    config = options.configuration("convit_ti", [*TINY[1:], "--config.mesh.fsdp=8"])
    model, mesh = settle.settle(config, "cpu"), sharding.make_mesh(8)

    def trace(found=None):
        traced, state, params = compiled.trace(config, model, mesh, 10, 100, found)
        sizes = collectives.expected_sizes(state, model, params)["all-gather"]
        return arithmetic.of_jaxpr(traced.jaxpr).flops, sizes

    alone, sizes_alone = trace()
    config.distill.teacher = str(path)
    found = teachers.read(config)
    both, sizes = trace(found)
    assert both - alone == pytest.approx(16 * forward_flops(teacher), rel=1e-6)
    assert 64 * 256 in sizes - sizes_alone  # a layer of the MLP
    with pytest.raises(ValueError, match=r"at least 13 classes, as model\.num_classes, got 12 in "):
        compiled.trace(config, model.clone(num_classes=13), mesh, 10, 100, found)


def test_forms_are_tried_until_parts_of_a_batch_fit(monkeypatch):
    def measure(name, config, model, mesh, *_):
        parts, size = config.train.accum_steps, 800 // config.train.accum_steps
        assert model.remat == config.train.remat
        return compiled.Step(
            name, 16, dict(mesh.shape), 0, 1.0, Arithmetic(), 0.0,
            memory=compiled.Memory(0, size, 0, 0) if parts > 1 else None, refusal="too much",
        )  # fmt: skip

    monkeypatch.setattr(compiled, "measure", measure)
    config = options.configuration("convit_ti", ["--config.train.batch_size=64"])
    config.train.remat = "mlp"
    assert [name for _, name, _ in attempts.less_memory(config, ["remat"], 8)] == [
        "train.remat=block"
    ]
    config.train.remat = "dots"
    model = setup.make_model(config, backend="cpu")
    made = attempts.compile_each(config, model, jax.devices(), attempts.KEYS, (1, 1), memory=300)
    assert [(step.name, step.fits(300)) for step in made] == [
        ("as configured", False), ("train.remat=mlp", False), ("train.remat=block", False),
        ("mesh.fsdp=8", False), ("train.accum_steps=2", False), ("train.accum_steps=4", True),
    ]  # fmt: skip


def test_what_cannot_be_planned_is_one_line(monkeypatch):
    def refused(error: str, *flags: str) -> None:
        with pytest.raises(SystemExit, match=f"error: .*{error}"):
            plan.main(["--config=digits", *flags])

    refused("expected a number", "--config=finetune", "--backend=cpu")
    refused("divisor of the 8 devices, got 3", "--backend=cpu", "--chips_per_host=3")
    refused("distill.teacher: .*t.pth", "--backend=cpu", "--config.distill.teacher=t.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"pip install -e '\.\[tpu-compiler\]'", "--topology=v5e:2x2")

    def fail(message: str) -> None:
        def get(*_, **__):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(topology.topologies, "get_topology_desc", get)

    monkeypatch.setattr(topology, "use_compiler_alone", lambda: None)
    fail("INVALID_ARGUMENT: Invalid TPU external name: TPU v9")
    refused("--topology: expected a pod such as .* got 'v9:2x2'", "--topology=v9:2x2")
    fail("ABORTED: Internal error when accessing libtpu multi-process lockfile.")
    refused("wait for that process, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1", "--topology=v5e:2x2")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_the_step_compiles_for_a_pod(tmp_path):
    """In its own process: libtpu must not come into this one."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "convit_jax", "plan", *POD, f"--json={file}"]
    done = subprocess.run(
        [*command, "--topology=v5e:2x4", "--try=fsdp"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    says = ("compiling ", "as configured: ", "mesh.fsdp=8: ", "wrote ")
    assert all(line.startswith(says) for line in done.stderr.splitlines()), done.stderr
    alone, split = json.loads(file.read_text())["steps"]
    assert (alone["mesh"], split["mesh"]) == ({"data": 8, "fsdp": 1}, {"data": 1, "fsdp": 8})
    assert split["memory"]["state"] / alone["memory"]["state"] == pytest.approx(1 / 8, rel=0.1)
    sent = [{c["kind"] for c in step["collectives"]} for step in (alone, split)]
    assert "all-reduce" in sent[0]
    assert "all-gather" not in sent[0]
    assert "all-gather" in sent[1]
    assert alone["fits"]
    assert split["bound"]["limit"] == "memory"
    # A step reads and writes the state at least once.
    assert alone["bytes_moved"] > 2 * alone["memory"]["state"]

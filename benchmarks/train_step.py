"""Training steps beside timm's, in one process, turn by turn.

    python -m benchmarks.train_step --variants convit_tiny convit_small --batch 8
    python -m benchmarks.train_step --dtype bfloat16 --batch 256 512 1024 --variants convit_base

The first line is for a CPU, the second for a GPU: of several batches, see which is the largest
that fits; with `--who` only one side holds the memory, for the two keep what they once took.

    forward       inference: normalised images in, logits out
    timm          forward with stochastic depth 0.1, cross entropy with soft labels, backward,
                  torch's AdamW with timm's decay groups; images are normalised and labels soft
                  beforehand; in bfloat16, under torch.autocast
    timm, compiled   the same under torch.compile (on a GPU)
    ours          the step of main.py: also normalises uint8 images, erases, mixes, makes the soft
                  labels, takes the norm of the gradients and updates the schedule
    ours, bare    without erasing and mixing

MFU counts the matrix products of the model, three times those of a forward pass in a step (see
convit_jax.flops), against the device's peak.
"""

import argparse
from collections.abc import Callable
import os

import jax
import jaxlib
import numpy as np

from benchmarks import peer
from benchmarks.model import measure
from configs import common
from convit_jax import create_model, flops, optim, sharding, startup, train_step

Run = Callable[[], object]
_FORWARD, _STEP = "forward", "step"


def our_runs(name: str, batch_size: int, dtype: str) -> dict[tuple[str, str], Run]:
    """(what, who) -> a function that does it once, and waits for it."""
    config = common.get_config()
    config.model.name = name
    config.train.update(dtype=dtype, batch_size=batch_size)
    rng, mesh = np.random.default_rng(0), sharding.make_mesh()
    model = startup.make_model(config)
    images = rng.integers(256, size=(batch_size, *model.image_shape), dtype=np.uint8)
    labels = rng.integers(model.num_classes, size=batch_size, dtype=np.int32)
    batch = {"image": images, "label": labels, "skipped": np.zeros(batch_size, np.int32)}
    batch = sharding.put_batch(batch, mesh)
    schedule = optim.learning_rate(config.optim, batch_size, 1251, 300 * 1251)
    optimizer = optim.make_optimizer(config.optim, schedule)

    def make_step() -> Run:
        step = train_step.make_train_step(model, optimizer, schedule, config, mesh)
        states = [train_step.init_state(model, optimizer, config, mesh)]

        def run() -> None:
            state, _ = step(states.pop(), batch)
            states.append(jax.block_until_ready(state))

        return run

    runs = {(_STEP, "ours"): make_step()}
    config = config.copy_and_resolve_references()
    config.mixup.update(mixup=0.0, cutmix=0.0, erase_prob=0.0)
    runs[_STEP, "ours, bare"] = make_step()

    params = train_step.init_state(model, optimizer, config, mesh).params
    forward = jax.jit(model.apply)
    floats = rng.standard_normal(images.shape, np.float32)
    floats = sharding.put_batch({"image": floats}, mesh)["image"]
    runs[_FORWARD, "ours"] = lambda: forward({"params": params}, floats).block_until_ready()
    return runs


def timms_runs(name: str, batch_size: int, dtype: str) -> dict[tuple[str, str], Run]:
    """(what, who) -> a function that does it once, and waits for it."""
    timm, torch = peer.import_timm()
    from timm.loss import SoftTargetCrossEntropy
    from timm.models.convit import ConVit
    from timm.optim import param_groups_weight_decay

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    sizes = create_model(name)
    if name.startswith("deit"):
        model = timm.create_model(f"{name}_patch16_224", drop_path_rate=0.1)
    else:  # see peer.make
        head = sizes.embed_dim // sizes.num_heads
        model = ConVit(
            embed_dim=head, num_heads=sizes.num_heads, local_up_to_layer=10, drop_path_rate=0.1
        )
    model, criterion = model.to(device), SoftTargetCrossEntropy()
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    labels = torch.softmax(torch.randn(batch_size, 1000, device=device), dim=1)
    groups = param_groups_weight_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay()
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-3)

    def forward() -> None:
        model.eval()
        with torch.inference_mode(), autocast:
            model(images).sum().item()

    def make_step(model) -> Run:
        def run() -> None:
            model.train()
            optimizer.zero_grad()
            with autocast:
                logits = model(images)
            loss = criterion(logits.float(), labels)
            loss.backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    runs = {(_FORWARD, "timm"): forward, (_STEP, "timm"): make_step(model)}
    if device.type == "cuda":
        runs[_STEP, "timm, compiled"] = make_step(torch.compile(model))
    return runs


def fitting(runs: dict[tuple[str, str], Run]) -> dict[tuple[str, str], Run]:
    """Those that the memory suffices for; they have then run, and compiled, once."""
    _, torch = peer.import_timm()
    fit = {}
    for key, run in runs.items():
        try:
            run()
            fit[key] = run
        except torch.OutOfMemoryError:
            print(f"{' '.join(key)}: does not fit")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{' '.join(key)}: does not fit")
    return fit


def table(name: str, batch_size: int, dtype: str, who: list[str], repetitions: int) -> None:
    """Measures one model at one batch size and prints its rows."""
    runs = {}
    if not who or "timm" in who:
        runs |= timms_runs(name, batch_size, dtype)
    if not who or "ours" in who:
        runs |= our_runs(name, batch_size, dtype)
    times = measure(fitting(runs), repetitions)
    model = create_model(name)
    counts = {_FORWARD: flops.forward_flops(model), _STEP: flops.training_flops(model)}
    peak = flops.peak_flops(jax.devices()[0], dtype)
    for what, whose in sorted(times, key=lambda key: (key[0], key[1] != "timm", key[1])):
        seconds = times[what, whose]
        rate = batch_size / np.median(seconds)
        line = f"{name:<18}{batch_size:>6}  {what:<9}{whose:<16}"
        line += f"{1000 * np.median(seconds):>8.0f}{rate:>10.1f}"
        line += f"{rate * counts[what] / peak / jax.device_count():>8.1%}" if peak else f"{'':>8}"
        if whose != "timm" and (what, "timm") in times:
            low, median, high = np.percentile(times[what, "timm"] / seconds, [25, 50, 75])
            line += f"{f'{median:.2f} ({low:.2f} to {high:.2f})':>34}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", choices=peer.NAMES, metavar="NAME",
        default=["convit_tiny", "convit_small"],
        help=f"of {', '.join(peer.NAMES)} (default: convit_tiny convit_small)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="(default: 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--who", nargs="+", choices=("ours", "timm"), default=[], help="only these")
    parser.add_argument("--repetitions", type=int, default=15, help="(default: 15)")
    args = parser.parse_args()

    # Otherwise three quarters of a GPU's memory are JAX's from the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    timm, torch = peer.import_timm()
    print(
        f"timm {timm.__version__}, torch {torch.__version__}, jaxlib {jaxlib.__version__}, ", end=""
    )
    device = jax.devices()[0].device_kind
    print(f"{jax.device_count()} {device}, {torch.get_num_threads()} threads, {args.dtype}")
    header = f"{'variant':<18}{'batch':>6}  {'':<25}{'ms':>8}{'images/s':>10}{'MFU':>8}"
    print(f"{header}{'ours / timm: median (quartiles)':>34}")
    for name in args.variants:
        for batch_size in args.batch:
            table(name, batch_size, args.dtype, args.who, args.repetitions)


if __name__ == "__main__":
    main()

"""What test_simulated.py asks of the simulated device, in one process; writes JSON to the file given."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_sdaa._inductor  # noqa: F401  (it registers teco_inductor)

import vitfn
from vitfn import tree

CONFIG = vitfn.ViTConfig(
    patch_size=8, image_size=16, hidden_size=24, num_layers=2, num_heads=2, mlp_dim=48, num_classes=5
)
GENERATOR = torch.Generator().manual_seed(0)
PARAMS = tree.map(lambda leaf: leaf + torch.randn(leaf.shape, generator=GENERATOR) / 10, vitfn.init(CONFIG, 0))
IMAGES, LABELS = torch.randn(4, 3, 16, 16, generator=GENERATOR), torch.tensor([0, 1, 2, 3])
X, W = torch.randn(3, 4, generator=GENERATOR), torch.randn(4, 4, generator=GENERATOR)


def raised(function: Callable, *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def moved(params, where: str):
    return tree.map(lambda leaf: leaf.clone().to(where), params)


def same(a, b) -> bool:
    a, b = tree.flatten(a), tree.flatten(b)
    return all(torch.equal(a[path].cpu(), b[path].cpu()) for path in a)


def strictness() -> dict:
    x = X.to("sdaa")
    return {
        "mixed": raised(torch.add, x, X),
        "index": raised(lambda: x[torch.tensor([0, 1])]),
        "other": raised(torch.add, x, X.to("sdaa:1")),
        "float64": raised(x.double),
        "numpy": raised(x.numpy),
        "scalar": torch.equal((x + torch.tensor(1.0)).cpu(), X + 1),
        "device": str(x.device),
        "absent": raised(X.to, "sdaa:9"),
    }


def writing() -> dict:
    """Each function, on the CPU and on the device, ends with the same numbers in all that it returns."""

    def views(x):
        x[:, 0] += 1
        x[1:].T[2].mul_(3)
        return [x, x.view(-1), x.mT.reshape(2, 6)]

    def outputs(x):
        out = x.new_empty(0)
        row = torch.zeros_like(x)
        return [torch.mul(x, 2, out=out), out, torch.add(x[0], 1, out=row[1]), row]

    def foreach(x):
        parts = list(x.unbind(0))
        torch._foreach_mul_(parts, 2.0)
        torch._foreach_add_(parts, [p.clone() for p in parts])
        return [x, *parts]

    def picking(x):
        x.masked_fill_(x > 0.5, 7)
        x[0].copy_(x[1])
        index = torch.tensor([2, 0], device=x.device)
        return [x, x[index], *x.topk(2), torch.cat(x.split([1, 3], 1), 1), x.gather(0, index[None].expand(1, 2))]

    def channels_last(x):
        y = x.reshape(1, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        return [y, y.permute(0, 2, 3, 1).view(4, 3), F.conv2d(y, x[:, :3, None, None].contiguous())]

    found = {}
    for function in (views, outputs, foreach, picking, channels_last):
        pairs = zip(function(X.clone()), function(X.to("sdaa")), strict=True)
        found[function.__name__] = all(torch.equal(a, b.cpu()) and a.stride() == b.stride() for a, b in pairs)
    x = X.to("sdaa")
    found["identity"] = x.add_(1) is x and torch.mul(x, 2, out=x) is x
    return found


def model() -> dict:
    def loss(params, images):
        return vitfn.apply(params, images, CONFIG).square().sum()

    params, images = moved(PARAMS, "sdaa"), IMAGES.to("sdaa")
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    return {
        "forward": torch.equal(vitfn.apply(params, images, CONFIG).cpu(), vitfn.apply(PARAMS, IMAGES, CONFIG)),
        "gradient": same(torch.func.grad(loss)(params, images), torch.func.grad(loss)(PARAMS, IMAGES)),
        "of each": same(each(params, images[:, None]), each(PARAMS, IMAGES[:, None])),
    }


def autocast() -> dict:
    """The dtypes that a product has inside of transforms, and values against casts written out on the CPU."""
    x, w, seen = X.to("sdaa"), W.to("sdaa"), []

    def loss(w, x, kind="sdaa"):
        with torch.autocast(kind, torch.float16):
            y = x @ w
            seen.append(str(y.dtype).removeprefix("torch."))
            return y.softmax(-1).square().sum()

    def by_hand(w, x):
        return (x.half() @ w.half()).float().softmax(-1).square().sum()

    found = {"value": torch.equal(loss(w, x).cpu(), by_hand(W, X))}
    leaf, reference = w.clone().requires_grad_(), W.clone().requires_grad_()
    loss(leaf, x).backward()
    by_hand(reference, X).backward()
    found["backward"] = torch.equal(leaf.grad.cpu(), reference.grad)
    rows = torch.vmap(loss, in_dims=(None, 0))(w, x[:, None])
    found["vmap"] = torch.allclose(rows.cpu(), torch.stack([by_hand(W, row[None]) for row in X]), atol=1e-3)
    for name in ("grad", "grad_and_value"):
        try:
            result, want = (getattr(torch.func, name)(f)(*a) for f, a in ((loss, (w, x)), (by_hand, (W, X))))
            pairs = zip(result, want, strict=True) if isinstance(result, tuple) else [(result, want)]
            found[name] = all(torch.equal(a.cpu(), b) for a, b in pairs)
        except RuntimeError as error:
            found[name] = str(error)
    found["seen"] = sorted(set(seen))
    seen.clear()
    loss(w, x, "cuda")
    return found | {"cuda": seen}


def scaler() -> dict:
    scaler = torch.amp.GradScaler("sdaa", init_scale=1024.0)
    w = W.to("sdaa").requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.5)
    scaler.scale((X.to("sdaa") @ w).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    moved_by = torch.allclose(w.detach().cpu(), W - 0.5 * X.sum(0)[:, None], atol=1e-6)
    before = w.detach().clone()
    w.grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    return {"moved": moved_by, "skipped": torch.equal(w, before), "scale": scaler.get_scale()}


def training() -> dict:
    """Three updates in each form, and the memory of fifty."""
    optimizer = vitfn.sgd(vitfn.warmup_cosine(0.1, 100, 1), momentum=0.9)

    def trained(form: str, precision: str, steps: int = 3, where: str = "sdaa"):
        params = moved(PARAMS, where)
        state = vitfn.TrainState(0, params, optimizer.init(params))
        step = vitfn.make_train_step(
            CONFIG, optimizer, precision=precision, compile=form, compile_fallback=False, max_grad_norm=1e9
        )
        used = []
        for _ in range(steps):
            state, _metrics = step(state, (IMAGES.to(where), LABELS.to(where)))
            used.append(torch.sdaa.memory_allocated())
        return tree.flatten(moved(state.params, "cpu")), used

    def apart(a, b) -> float:
        return max(float((a[path] - b[path]).abs().max()) for path in a)

    found = {}
    cpu = trained("off", "float32", where="cpu")[0]
    for precision in ("float32", "float16"):
        eager = trained("off", precision)[0]
        found[f"cpu {precision}"] = apart(eager, cpu)
        for form in ("block", "step"):
            try:
                found[f"{form} {precision}"] = apart(trained(form, precision)[0], eager)
            except vitfn.errors.RunError as error:
                found[f"{form} {precision}"] = str(error)
    torch.sdaa.reset_peak_memory_stats()
    used = trained("off", "float32", steps=50)[1]
    return found | {"early": used[4], "late": used[-1], "peak": torch.sdaa.max_memory_allocated() > max(used)}


def compiling() -> dict:
    def double(x):
        return x * 2

    x = X.to("sdaa")

    def failing(**named):
        torch._dynamo.reset()
        return raised(lambda: torch.compile(double, backend="teco_inductor", **named)(x))

    return {
        "plain": failing(),
        "mode": failing(mode="reduce-overhead"),
        "options": failing(options={"a": 1}),
        "dynamic": failing(dynamic=True),
    }


if __name__ == "__main__":
    checks = (strictness, writing, model, autocast, scaler, training, compiling)
    with open(sys.argv[1], "w") as file:
        json.dump({check.__name__: check() for check in checks}, file)

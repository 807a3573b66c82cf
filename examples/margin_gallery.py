# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Draws the losses: docs/margins.png, docs/adacos.png and docs/circle.png.

python examples/margin_gallery.py   # a minute or two; the library computes every curve
"""

import io
import math
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import circle
import marginkernels as mk
from marginkernels.transforms import TRANSFORMS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

DOCS = Path(__file__).parents[1] / "docs"
THETA = torch.linspace(0, math.pi, 1441, dtype=torch.float64)
PLAIN = "#ced4da"
COLORS = ("#1864ab", "#e8590c", "#2b8a3e", "#862e9c", "#c92a2a", "#0b7285", "#f08c00")
SEEN_FROM = math.radians(50)  # angle to the target in the curves of the other classes
LAST_OF_THE_NEAREST = math.cos(math.radians(60))  # cosine of the last class that gets a penalty
SCALE = torch.tensor(32.0, dtype=torch.float64)  # where a loss adds a bias to the logits

plt.rcParams.update({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False})


def target(margin: nn.Module, x_norm: float = 1.0) -> Tensor:
    """Returns the t that takes the place of the target's cosine, at each angle."""
    ones = torch.ones_like(THETA)
    label = torch.zeros(len(THETA), dtype=torch.int64)
    rows = mk.Rows(label, x_norm * ones, ones, None, scale=SCALE)
    with torch.no_grad():
        return margin.double().eval()(THETA.cos(), rows)


def others(margin: mk.Margin) -> Tensor:
    """Returns the values that replace another class's cosine, for one angle to the target."""
    ones = torch.ones(1, dtype=torch.float64)
    label, hardest = torch.zeros(1, dtype=torch.int64), (ones * LAST_OF_THE_NEAREST).expand(1, 6)
    rows = mk.Rows(label, ones, None, None, scale=SCALE, hardest=hardest)
    c = ones * math.cos(SEEN_FROM) if margin.needs_target_cosine else ones.new_empty(0)
    with torch.no_grad():
        name, *operands = margin.double().eval().negatives(c, rows)
        return TRANSFORMS[name].function(THETA.cos()[None], *operands)[0][0]


def target_and_others(margin: mk.Margin) -> dict[str, Tensor]:
    """Returns both curves of a margin by their labels."""
    return {"target": target(margin), "others": others(margin)}


def curricular_face(t: float) -> mk.CurricularFace:
    """Returns the margin once the average of the target cosines has come to t."""
    margin = mk.CurricularFace()
    margin.t.fill_(t)
    return margin


def ada_face() -> mk.AdaFace:
    """Returns the margin once norms have the mean 20 and the standard deviation 2."""
    margin = mk.AdaFace()
    margin.batch_std.fill_(2)
    return margin


def annealed(margin: type, m: int, weight: float) -> nn.Module:
    """Returns the margin once its annealing has come to the weight lambda."""
    return margin(m, base=0, low=weight)


def panels() -> dict[str, dict[str, Tensor]]:
    """Computes curves by panel and label. Labels of other classes' curves begin with "others"."""
    arcs = {branch: target(mk.ArcFace(branch=branch)) for branch in
            ("none", "easy", "keep", "hard", "continuous", "monotone", "clip")}  # fmt: skip
    return {
        "ArcFace, m = 0.5": arcs,
        "CombinedMargin, (1, 0.3, 0.2)": {
            branch: target(mk.CombinedMargin(1.0, 0.3, 0.2, branch=branch)) for branch in arcs
        },
        "CombinedMargin, (1.35, 0.2, 0.1)": {
            branch: target(mk.CombinedMargin(1.35, 0.2, 0.1, branch=branch))
            for branch in ("none", "monotone")
        },
        "CosFace, AdaMSoftmax": {
            f"m = {m}": target(mk.CosFace(m)) for m in (0.2, 0.35, 0.5)
        },
        "SphereFace (SphereFace-R)": {
            f"m = {m}": target(mk.SphereFace(m)) for m in (1.35, 1.7, 4.0)
        },
        "ASoftmax, m = 4 (SphereFace as published)": {
            rf"$\lambda$ = {weight}": target(annealed(mk.ASoftmax, 4, weight))
            for weight in (1000, 50, 5)
        },
        r"LSoftmax, $\lambda$ = 0": {
            f"m = {m}": target(annealed(mk.LSoftmax, m, 0)) for m in (2, 3, 4)
        },
        "X2Softmax": {"a = -0.9, h = 0, k = 0.65": target(mk.X2Softmax())},
        "ElasticFace, two deviations about the mean": {
            f"{kind}, m = {m}": target(mk.ElasticFace(m, kind=kind))
            for kind, margins in (("arc", (0.4, 0.6)), ("cos", (0.25, 0.45)))
            for m in margins
        },
        "AdaFace, m = 0.4": {
            f"q = {q}": target(ada_face(), 20 + 6.1 * q) for q in (-1, 0, 1)
        },
        "MagFace": {
            f"{branch}, |x| = {x_norm}": target(mk.MagFace(branch=branch), x_norm)
            for branch in ("easy", "hard")
            for x_norm in (10, 110)
        },
        "AirFace (Li-ArcFace), m = 0.4": target_and_others(mk.AirFace()),
        "MVSoftmax": {
            "am, m = 0.35": target(mk.MVSoftmax()),
            "arc, m = 0.5": target(mk.MVSoftmax(0.5, kind="arc")),
            "others, am": others(mk.MVSoftmax()),
            "others, arc": others(mk.MVSoftmax(0.5, kind="arc")),
        },
        "CurricularFace, m = 0.5": {
            "target": target(mk.CurricularFace()),
            **{f"others, t = {t}": others(curricular_face(t)) for t in (0.0, 0.4, 0.8)},
        },
        "ArcNegFace, m = 0.5": target_and_others(mk.ArcNegFace()),
        "InterClassFilter, threshold 0.4": {
            "target, CosFace(0.4)": target(mk.InterClassFilter(mk.CosFace())),
            "others": others(mk.InterClassFilter(mk.CosFace())),
        },
        "InterTopK, ArcFace(0.2), penalty 0.2": target_and_others(
            mk.InterTopK(mk.ArcFace(0.2), penalty=0.2)
        ),
        "Circle, m = 0.25": target_and_others(mk.Circle()),
        "SphereFace2, bias 0": {
            "C, m = 0.4": target(mk.SphereFace2()),
            "A, m = 0.4": target(mk.SphereFace2(kind="A")),
            "others, C": others(mk.SphereFace2()),
            "others, A": others(mk.SphereFace2(kind="A")),
        },
        "UnifiedCE, 100,000 classes, scale 32": target_and_others(mk.UnifiedCE(100_000)),
    }  # fmt: skip


def draw_margins(path: Path) -> None:
    """Draws one panel for each margin."""
    figure, axes = plt.subplots(5, 4, figsize=(14, 15.2), layout="constrained", sharex=True)
    for panel, (title, curves) in zip(axes.flat, panels().items(), strict=True):
        draw_curves(panel, curves)
        panel.set_title(title, fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("angle, degrees")
    for panel in axes[:, 0]:
        panel.set_ylabel("logit / scale")
    figure.suptitle(
        "Logit of the target against its angle; grey: no margin (NSoftmax); branches are drawn "
        "where they differ from the first curve.\nDashed: logit of another class against the angle "
        "to it, where the loss changes that; if it depends on the target, for a row at "
        f"{math.degrees(SEEN_FROM):.0f} degrees from its own."
    )
    save(figure, path)


def draw_curves(axes: Axes, curves: dict[str, Tensor]) -> None:
    """Draws each curve where it differs from the first, and broad if a later one lies on it."""
    axes.plot(THETA.rad2deg(), THETA.cos(), color=PLAIN, linewidth=6)
    first, *rest = curves.values()
    shown = [first, *(c.masked_fill((c - first).abs() < 1e-9, math.nan) for c in rest)]
    for i, label in enumerate(curves):
        is_covered = any(((shown[i] - c).abs() < 1e-9).sum() > 10 for c in shown[i + 1 :])
        is_other = label.startswith("others")
        axes.plot(THETA.rad2deg(), broken_at_jumps(shown[i]), color=COLORS[i], label=label,
                  linestyle="--" if is_other else "-",
                  linewidth=4 if is_covered and not is_other else 1.5)  # fmt: skip
    axes.set(xlim=(0, 180), xticks=range(0, 181, 45))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False, handlelength=2)


def broken_at_jumps(curve: Tensor) -> Tensor:
    """Leaves a gap where one branch ends elsewhere than the next begins."""
    steps = curve.diff().abs()
    gaps = steps > 8 * steps.nanmedian().clamp_min(1e-3)
    return curve.masked_fill(torch.cat([gaps, gaps.new_zeros(1)]), math.nan)


def probability(margin: nn.Module, scale: float, num_classes: int) -> Tensor:
    """Returns the target's probability at each angle, with all other classes at 90 degrees."""
    return torch.sigmoid(scale * target(margin) - math.log(num_classes - 1))


def draw_adacos(path: Path) -> None:
    """Draws what scale and margin do to the target's probability, as the AdaCos paper does."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", sharey=True)
    classes, scale = 100_000, 32.0
    left, middle, right = axes
    fixed = mk.AdaCos(classes, dynamic=False)()
    for s in (8, fixed, 24, 32, 64):
        name = f"s = {s:.1f}, fixed AdaCos" if s == fixed else f"s = {s}"
        curve(left, probability(mk.NSoftmax(), s, classes), name, bold=s == fixed)
    left.set_title(f"N-Softmax, {classes:,} classes: the scale alone")
    for c in (10, 1000, 100_000, 10_000_000):
        s = mk.AdaCos(c, dynamic=False)()
        curve(middle, probability(mk.NSoftmax(), s, c), f"{c:,} classes: s = {s:.1f}")
    middle.set_title(r"fixed AdaCos, $s = \sqrt{2}\,\ln(C - 1)$: P = 1/2 at 45 degrees")
    for m in (0.0, 0.2, 0.5, 0.8):
        curve(right, probability(mk.ArcFace(m), scale, classes), f"m = {m}")
    right.set_title(f"ArcFace, {classes:,} classes, s = {scale:.0f}: the margin")
    for panel in (left, middle):
        panel.plot([45], [0.5], "o", color="black", markersize=4, zorder=5)
    left.set_ylabel("probability of the target")
    figure.suptitle("Probability of the target against its angle, the other classes at 90 degrees")
    save(figure, path)


def curve(axes: Axes, p: Tensor, label: str, bold: bool = False) -> None:
    """Draws one curve of probabilities."""
    color = COLORS[len(axes.get_lines()) % len(COLORS)]
    axes.plot(THETA.rad2deg(), p, label=label, color=color, linewidth=3 if bold else 1.6)
    axes.set(xlim=(0, 180), xticks=range(0, 181, 45), xlabel="angle, degrees", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right", frameon=False)


def draw_circle(path: Path) -> None:
    """Draws the embeddings of Softmax as they are, those of normalised heads on the circle."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.4), layout="constrained")
    toys, ink = circle.train(), circle.glyphs()[:, 0]
    for panel, (name, toy) in zip(axes, toys.items(), strict=True):
        is_normalised = name != next(iter(toys))
        draw_toy(panel, toy, ink, is_normalised)
        spread = toy.degrees().mean()
        where = "on the circle" if is_normalised else "as they are"
        panel.set_title(f"{name}: embeddings {where},\n{spread:.1f} degrees from their class")
    save(figure, path)


def draw_toy(axes: Axes, toy: circle.Toy, ink: Tensor, is_normalised: bool) -> None:
    """Draws embeddings, class weights and characters."""
    generator = torch.Generator().manual_seed(0)
    points = toy.embeddings
    if is_normalised:  # spread into a ring, to show how many there are
        radius = 1 + 0.05 * torch.randn(len(points), 1, generator=generator).clamp(-2, 2)
        points = radius * F.normalize(points)
    reach = points.norm(dim=1).quantile(0.99)
    for i, direction in enumerate(F.normalize(toy.weight)):
        color = plt.get_cmap("tab10")(i)
        axes.plot(*torch.stack([0 * direction, reach * direction]).T, color=color, linewidth=1)
        x, y = points[toy.labels == i].T
        axes.scatter(x, y, s=8, color=color, alpha=0.5, linewidths=0)
        picture = OffsetImage(1 - ink[i], zoom=0.7, cmap="gray")
        box = AnnotationBbox(picture, 1.16 * reach * direction, pad=0.15,
                             bboxprops=dict(edgecolor=color, linewidth=1.5))  # fmt: skip
        box.set_in_layout(False)
        axes.add_artist(box)
    axes.set(xlim=(-1.3 * reach, 1.3 * reach), ylim=(-1.3 * reach, 1.3 * reach), aspect=1)
    axes.set_axis_off()


def save(figure: Figure, path: Path) -> None:
    """Saves a picture with a palette, which halves the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    drawings = {"margins": draw_margins, "adacos": draw_adacos, "circle": draw_circle}
    for name, draw in drawings.items():
        path = DOCS / f"{name}.png"
        draw(path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

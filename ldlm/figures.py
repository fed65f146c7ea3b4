"""Figures from plain numbers.

In: lists or CPU tensors. Out: matplotlib figures, to be saved or logged.
Paper: Fig. 5 (loss against t and against the adapted time), Fig. 6 (gamma against the step).
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

SIZE = (4.2, 3.2)  # inches a panel


def loss_over_time(u: Sequence[float], adapted: Sequence[float], loss: Sequence[float]) -> Figure:
    """Denoising loss against schedule time u and against adapted time F(u): Fig. 5.

    With timesteps that have adapted, the second panel is close to a straight line.

    Args:
        u: Schedule times, rising.
        adapted: F(u) of each.
        loss: Mean squared error per element at each.
    """
    figure = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(u, loss)
    left.set(xlabel="schedule time u", ylabel="diffusion loss (MSE per element)", xlim=(0, 1))
    right.plot(adapted, loss)
    if len(loss) > 1:
        right.plot(
            [adapted[0], adapted[-1]], [loss[0], loss[-1]], color="grey", linestyle="--", linewidth=1, label="linear"
        )
        right.legend(frameon=False)
    right.set(xlabel="adapted time F(u)", xlim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def gamma_curve(steps: Sequence[int], gamma: Sequence[float], now: int | None = None) -> Figure:
    """Diffusion-to-encoder coefficient against the optimizer step: Fig. 6.

    Args:
        steps: Optimizer steps.
        gamma: Coefficient at each.
        now: Where the run is.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, gamma)
    if now is not None:
        axes.axvline(now, color="grey", linestyle="--", linewidth=1, label="now")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step s", ylabel="γ(s)", ylim=(-0.02, 1.05))
    axes.grid(alpha=0.3)
    return figure

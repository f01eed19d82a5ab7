"""A method of your own: SAM along the base's momentum, which needs one pass where SAM needs two.

    w~ = w - rho v / (||v|| + 1e-12)        v: the momentum buffer of SGD; the gradient is taken at w~

After Becker, Altrock, Risse: "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead", 2024, arXiv
2401.12033. It runs on every backend, because it knows only `space` and `oracle`. Run: python examples/own_method.py
(An installed package registers its method by an entry point in group `elastic_lsopt.methods` instead.)
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits

import elastic_lsopt as lso


@lso.registry.register("look_ahead")
@dataclass(frozen=True, kw_only=True)
class LookAhead:
    """Cost: one pass. Memory: one shard while perturbed. The base must be SGD with momentum."""

    rho: float = 0.3
    """L2 distance, in units of the weights; >= 0."""

    parts = 1

    def init(self, space):
        return {}

    def gradient(self, space, oracle, state):
        if oracle.step == 0:
            return oracle.gradient()  # there is no momentum yet
        v = space.base_state("momentum_buffer")
        with space.perturbed(v, -self.rho / (space.norm(v) + 1e-12)):
            return oracle.gradient()


def held_out_accuracy(method) -> tuple[int, float]:
    """Passes a step, and the accuracy on 397 held-out digits after 150 steps."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    optimizer = lso.LandscapeOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9), method)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        return loss

    for step in range(150):
        batch = torch.randint(0, 1400, (64,), generator=torch.Generator().manual_seed(step))
        optimizer.step(closure)
    with torch.no_grad():
        accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    return optimizer.last_step.passes, accuracy


def main() -> None:
    for method in (lso.Plain(), LookAhead(), lso.SAM(rho=0.1)):
        passes, accuracy = held_out_accuracy(method)
        print(f"{method}: passes a step {passes}, held-out accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()

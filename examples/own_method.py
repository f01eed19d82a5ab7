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


@lso.registry.register("momentum_sam")
@dataclass(frozen=True, kw_only=True)
class MomentumSAM:
    """Cost: one pass. Memory: one shard while displaced. The base must be SGD with momentum."""

    rho: float = 0.3
    """L2 distance, in units of the weights; >= 0."""

    parts = 1

    def init(self, space):
        return {}

    def gradient(self, space, oracle, state):
        if oracle.step == 0:
            return oracle.gradient()  # there is no momentum yet
        v = space.base_state("momentum_buffer")
        with space.displaced(v, -self.rho / (space.norm(v) + 1e-12)):
            return oracle.gradient()


def main() -> None:
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    train, held_out = slice(0, 1400), slice(1400, None)
    for method in (lso.Plain(), MomentumSAM(), lso.SAM(rho=0.1)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
        base = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        optimizer = lso.LandscapeOptimizer(base, method)
        for step in range(150):
            batch = torch.randint(0, 1400, (64,), generator=torch.Generator().manual_seed(step))

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[train][batch]), y[train][batch])
                loss.backward()
                return loss

            optimizer.step(closure)
        with torch.no_grad():
            accuracy = (model(x[held_out]).argmax(1) == y[held_out]).float().mean().item()
        assert optimizer.last_step is not None
        print(f"{method}: passes a step {optimizer.last_step.passes}, held-out accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()

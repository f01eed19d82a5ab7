"""SAM under Lightning's automatic optimisation, which hands `step` a closure: nothing but the optimizer is new.

    python examples/with_lightning.py          # seconds on a CPU; Trainer(devices=2, strategy="ddp") is the same

`accumulate_grad_batches` is left at 1, because Lightning runs the earlier micro-batches' closures only once; take them
together in `training_step`. On DeepSpeed `lso.LandscapeDeepSpeedStrategy` takes the place of Lightning's own, which
runs the closure once; it takes `accumulate_grad_batches` too (docs/trainer.md).
"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import elastic_lsopt as lso


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
        self.losses = []

    def training_step(self, batch, index):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self):
        base = torch.optim.AdamW(self.named_parameters(), lr=1e-2)
        return lso.LandscapeOptimizer(base, lso.SAM(rho=0.05), max_grad_norm=1.0)

    def on_train_batch_end(self, outputs, batch, index):
        self.losses.append(self.optimizers().optimizer.last_step.loss)  # of the first pass: at the weights themselves

    def on_train_epoch_end(self):
        passes = self.optimizers().optimizer.last_step.passes
        mean = sum(self.losses) / len(self.losses)
        print(f"epoch {self.current_epoch}: loss {mean:.4f}, {len(self.losses)} steps of {passes} passes")
        self.losses.clear()


def main():
    lightning.seed_everything(0, verbose=False)
    x, teacher = torch.randn(1024, 16), torch.randn(16, 4)
    loader = DataLoader(TensorDataset(x, (x @ teacher).argmax(1)), batch_size=64, shuffle=True)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=10, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), loader)


if __name__ == "__main__":
    main()

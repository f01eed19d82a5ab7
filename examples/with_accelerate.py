"""SAM in a loop of one's own under accelerate: several micro-batches a step, on however many processes there are.

    python examples/with_accelerate.py                                           # seconds on a CPU
    accelerate launch --cpu --num_processes 2 examples/with_accelerate.py        # DistributedDataParallel

What is new beside accelerate's own loop: the forward and the backward are a closure, which each pass of the method runs
again. Hand every micro-batch's closure to `accumulate`; `step` with the last of them is one update. Under DeepSpeed,
where accelerate steps inside of backward, use `lso.initialize` or `lso.LandscapeTrainer`.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import elastic_lsopt as lso

ACCUMULATED, EPOCHS = 4, 10


def main():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    set_seed(0)
    x, teacher = torch.randn(1024, 16), torch.randn(16, 4)
    loader = DataLoader(TensorDataset(x, (x @ teacher).argmax(1)), batch_size=16, shuffle=True)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = lso.LandscapeOptimizer(base, lso.SAM(rho=0.05), max_grad_norm=1.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10_000))
    for epoch in range(EPOCHS):
        losses = []
        for inputs, labels in loader:
            with accelerator.accumulate(model):

                @optimizer.accumulate
                def closure(inputs=inputs, labels=labels):
                    optimizer.zero_grad()
                    loss = torch.nn.functional.cross_entropy(model(inputs), labels)
                    accelerator.backward(loss)  # which divides it by the number of micro-batches
                    return loss.detach() / ACCUMULATED

                loss = optimizer.step(closure)  # 0 until the last micro-batch, then that of the update
                schedule.step()
                if accelerator.sync_gradients:
                    losses.append(loss)
        passes = optimizer.last_step.passes
        accelerator.print(
            f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}, {len(losses)} steps of {passes} passes"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()

"""Training as the command line does it, with a fault on one rank: FAULT="KIND RANK STEP" in the environment."""

import os
import time

import torch

from megatron_mamba.train import loop
from megatron_mamba.train.__main__ import main

kind, rank, step = os.environ["FAULT"].split()
train_step = loop.Trainer._train_step


def faulty_step(self: loop.Trainer, *arguments: object) -> dict[str, object]:
    if self.context.global_rank == int(rank) and self.step == int(step):
        print(f"fault at {time.time()}", flush=True)
        if kind == "exception":
            raise ValueError("a fault on purpose")
        if kind == "flip":
            weight = dict(self.pipeline.named_parameters())["final_norm.weight"].to_local().detach()
            weight.view(torch.int64)[0] ^= 1
            return train_step(self, *arguments)
        assert kind == "nan"
        norm = loop.global_grad_norm

        def poisoned(parameters: list[torch.nn.Parameter], context: object) -> torch.Tensor:
            loop.global_grad_norm = norm
            gradient = next(p.grad for p in parameters if p.grad is not None)
            getattr(gradient, "_local_tensor", gradient).fill_(torch.nan)
            return norm(parameters, context)

        loop.global_grad_norm = poisoned
    return train_step(self, *arguments)


loop.Trainer._train_step = faulty_step
main()

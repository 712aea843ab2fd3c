"""Seconds per 1,024 samples of each phase against the batch size, AlexNet on noise; sizes interleaved, median of five rounds with the
smallest and largest. What it shows is the machine's, and nothing is asserted."""
import statistics

import torch

from adabatch.data import load_data
from adabatch.models import get_model
from adabatch.schedule import fixed
from adabatch.train import PHASES, Trainer, best_device

SIZES, ROUNDS = (16, 64, 256, 1024), 5


def main():
    data = load_data("fake", device=best_device())
    data.train_size = 1024
    seconds = {size: [] for size in SIZES}
    for _ in range(ROUNDS):
        for size in SIZES:
            model = get_model("alexnet")
            trainer = Trainer(model, torch.optim.SGD(model.parameters(), momentum=0.9), data, fixed(size, lr=0.01, epochs=1))
            row = trainer.fit()[0]
            seconds[size].append([row[f"{p}_seconds"] for p in PHASES])
    print(f"AlexNet, {data.device.type}, {torch.get_num_threads()} threads, {trainer.clock.source}: seconds per 1,024 samples, median (least, most)")
    print("batch " + "".join(f"{p:>26s}" for p in PHASES))
    for size, rows in seconds.items():
        print(f"{size:5d} " + "".join(f"{statistics.median(c):12.3f} ({min(c):.3f}, {max(c):.3f})".rjust(26) for c in zip(*rows)))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What minilearner costs, as ratios to a hand-written loop, taken side by side in one run.

    python .ci/bench.py               everything, on one CPU thread (some minutes)
    python .ci/bench.py --quick       the same in small, under a minute
    python .ci/bench.py --threads 2
    python .ci/bench.py --device cuda

Each line is a ratio of two times, measured in turns: the one, the other, and again, five
times in each round (--quick: three), so that both see the same machine. Shown are the
minimum, median and maximum of the ratios of all rounds, and the figure that the median
should reach. Nothing here fails.

  loop        Learner with its defaults (recorder, table into nowhere) and one metric, by
              training batch and by validation batch, against a hand-written loop with
              the same optimizer that reports the same: mean training loss, validation loss,
              accuracy. On a 784-50-10 MLP (batch 64), a small CNN (batch 64), 60 Linear
              layers of width 64 (batch 16). Batches are ready-made tensors on the device.
  optimizer   a step of minilearner's Adam against torch.optim.AdamW's default, for 4, 62 and
              120 parameter tensors; on CUDA against foreach=True, for 161.
  deep MLP    60 layers, Learner with its own Adam, and with partial(AdamW, fused=True),
              against the hand-written loop with torch.optim.AdamW's default.
  data        tensors in memory, shuffled: batches of DataLoader(TensorDataset) against ours.
  reads       values read from the device per training batch (counted).
  memory      peak of the training, against the hand-written loop.
  growth      batches per second with 10 and 1,000 parameter tensors, with 1,000 and 100,000
              batches an epoch, and the memory that is kept of each batch (on Linux).
  import      of minilearner against that of torch, in fresh processes.
  others      the hand-written loop on the MLP against fastai, Lightning, skorch, ignite and
              accelerate, as far as they are installed.
"""
import argparse
import contextlib
import copy
import functools
import gc
import importlib.metadata
import importlib.util
import io
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import minilearner as ml


# ------------------------------------------------------------------------- measuring

def seconds(f, device):
    """Wall time of one call of `f`, with all its work on the device done."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(ours, theirs, args):
    """A ratio of the times of `ours` and `theirs` for each round, taken in turns."""
    turns = 3 if args.quick else 5      # a burst of other work then hits both alike
    ours(), theirs()
    found = []
    for _ in range(args.rounds):
        gc.collect()
        gc.disable()
        times = [0, 0]
        try:
            for turn in range(turns):
                pair = [(ours, 0), (theirs, 1)]
                for f, k in pair if turn % 2 else pair[::-1]:
                    times[k] += seconds(f, args.device)
        finally:
            gc.enable()
        found.append(times[0] / times[1])
    return found


def show(name, values, target=None, unit=''):
    values = values if isinstance(values, list) else [values]
    cells = [f'{v:.3g}' if v >= 10 else f'{v:.2f}' for v in
             (min(values), statistics.median(values), max(values))]
    print(f"{name:44} {cells[0]:>7} {cells[1]:>7} {cells[2]:>7}   {target or ''}{unit}", flush=True)


# ------------------------------------------------------------------------- models, loops

def mlp():
    return nn.Sequential(nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10))


def cnn():
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(),
                         nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10))


def deep():
    return nn.Sequential(*[m for _ in range(59) for m in (nn.Linear(64, 64), nn.ReLU())],
                         nn.Linear(64, 10))


def batches(n, bs, n_in, device):
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(bs, n_in, generator=rng).to(device),
             torch.randint(10, (bs,), generator=rng).to(device)) for _ in range(n)]


def plain_train(model, opt, train):
    """An epoch of training by hand; the mean loss."""
    model.train()
    total, count = 0., 0
    for xb, yb in train:
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        opt.step()
        opt.zero_grad()
        total += loss.detach() * len(xb)
        count += len(xb)
    return float(total / count)


@torch.no_grad()
def plain_valid(model, valid):
    """Mean loss and accuracy over a validation set, by hand."""
    model.eval()
    total, right, count = 0., 0., 0
    for xb, yb in valid:
        pred = model(xb)
        total += F.cross_entropy(pred, yb) * len(xb)
        right += (pred.argmax(1) == yb).float().mean() * len(xb)
        count += len(xb)
    return float(total / count), float(right / count)


def learner(model, train, valid, opt_func, device):
    dls = ml.DataLoaders(train, valid, device=device)
    learn = ml.Learner(dls, model, F.cross_entropy, opt_func, lr=1e-3, metrics=ml.accuracy)
    learn.logger = lambda row: None
    return learn


def loop_ratios(make, n, bs, n_in, opt_class, own_opt, args):
    """Ratios of a training epoch of `n` batches, and of a validation, of Learner and plain loop."""
    torch.manual_seed(0)
    model = make().to(args.device)
    ready = batches(max(12, n // 8) if args.quick else n, bs, n_in, args.device)
    twin = copy.deepcopy(model)
    opt = opt_class(twin.parameters(), lr=1e-3)
    learn = learner(model, ready, None, own_opt, args.device)
    train = ratios(lambda: learn.fit(1), lambda: plain_train(twin, opt, ready), args)
    both = learner(model, ready[:1], ready, own_opt, args.device)
    valid = ratios(lambda: both.fit(1), lambda: (plain_train(twin, opt, ready[:1]), plain_valid(twin, ready)), args)
    return train, valid


def bench_loop(args):
    for name, make, n, bs, n_in in [('MLP 784-50-10, batch 64', mlp, 800, 64, 784), ('CNN, batch 64', cnn, 200, 64, 784),
                                    ('60 Linear layers, batch 16', deep, 100, 16, 64)]:
        train, valid = loop_ratios(make, n, bs, n_in, torch.optim.SGD, torch.optim.SGD, args)
        show(f'loop: {name}, training', train, '<= 1.03')
        show(f'loop: {name}, validation', valid, '<= 1.10')


# ------------------------------------------------------------------------- optimizer

def resnet_shapes(blocks, bottleneck):
    """Shapes of the parameters of a ResNet: 62 for ResNet-18, 161 for ResNet-50."""
    shapes, n_in = [(64, 3, 7, 7), (64,), (64,)], 64
    for width, n in zip((64, 128, 256, 512), blocks):
        n_out = width * (4 if bottleneck else 1)
        for i in range(n):
            kernels = [(width, n_in, 1), (width, width, 3), (n_out, width, 1)] if bottleneck else \
                [(width, n_in, 3), (width, width, 3)]
            if i == 0 and n_in != n_out:
                kernels.append((n_out, n_in, 1))
            for a, b, k in kernels:
                shapes += [(a, b, k, k), (a,), (a,)]
            n_in = n_out
    return shapes + [(1000, n_in), (1000,)]


def params_of(shapes, device):
    params = [nn.Parameter(torch.randn(s, device=device) * 0.01) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def bench_optimizer(args):
    mlps = [(50, 784), (50,), (10, 50), (10,)]
    layers = [s for _ in range(60) for s in ((64, 64), (64,))]
    cases = [('4 tensors (MLP)', mlps, {}, 200), ('62 tensors (ResNet-18)', resnet_shapes((2, 2, 2, 2), False), {}, 1),
             ('120 tensors (60 layers)', layers, {}, 20)]
    limit = '<= 1.00'
    if args.device.type == 'cuda':
        cases = [('161 tensors (ResNet-50), foreach=True', resnet_shapes((3, 4, 6, 3), True), {'foreach': True}, 20)]
        limit = '<= 1.30'
    for name, shapes, kwargs, n in cases:
        own = ml.Adam(params_of(shapes, args.device), lr=1e-3)
        for p, *_ in own.all_params():      # as a Learner marks biases and norm layers
            own.state[p]['do_wd'] = p.dim() > 1
        other = torch.optim.AdamW(params_of(shapes, args.device), lr=1e-3, **kwargs)

        def repeat(opt):
            return lambda: [opt.step() for _ in range(n if not args.quick else max(1, n // 4))]
        show(f'optimizer: {name}', ratios(repeat(own), repeat(other), args), limit)
    train, _ = loop_ratios(deep, 25, 16, 64, torch.optim.AdamW, ml.Adam, args)
    show('deep MLP: own Adam, against AdamW by hand', train, '<= 0.90')
    fused = functools.partial(torch.optim.AdamW, fused=True)
    train, _ = loop_ratios(deep, 25, 16, 64, torch.optim.AdamW, fused, args)
    show('deep MLP: fused AdamW, against AdamW by hand', train, 'the least')


# ------------------------------------------------------------------------- data

def bench_data(args):
    n = 2048 if args.quick else 8192
    for shape in [(1, 40), (784,)]:
        x, y = torch.randn(n, *shape, device=args.device), torch.randint(10, (n,), device=args.device)
        ours = ml.DataLoaders.from_tensors(x, y, valid_pct=0, bs=64, device=args.device).train
        theirs = DataLoader(TensorDataset(x.cpu(), y.cpu()), 64, shuffle=True)
        found = ratios(lambda: [None for _ in theirs], lambda: [None for _ in ours], args)
        name = 'x'.join(map(str, shape))
        show(f'data: times DataLoader, rows of {name} floats', found, '>= 20')
    where = {b.device.type for b in next(iter(ours))}
    print(f"data: batches of tensors on {args.device.type} are on {', '.join(where)}")


# ------------------------------------------------------------------------- counts and memory

class CountReads(TorchDispatchMode):
    """Counts the values that are read from the device, and copies to the host."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        to_host = name in ('aten::_to_copy', 'aten::copy_') and \
            torch.device((kwargs or {}).get('device') or args[0].device).type == 'cpu' and \
            any(getattr(a, 'is_cuda', False) for a in args)
        self.n += name == 'aten::_local_scalar_dense' or to_host
        return func(*args, **(kwargs or {}))


def bench_reads(args):
    def count(n, fit, **kwargs):
        learn = learner(mlp(), batches(n, 8, 784, args.device), None, ml.Adam, args.device)
        learn.recorder.train_metrics = True
        learn.add_cb(ml.GradientClip(1.))
        learn.to_bf16()
        with CountReads() as counter:
            fit(learn)
        return counter.n
    for name, fit in [('fit', lambda learn: learn.fit(1)), ('one cycle', lambda learn: learn.fit_one_cycle(1))]:
        few, many = count(3, fit), count(33, fit)
        show(f'reads per training batch: {name}', (many - few) / 30, '= 0')


MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {root!r} + '/.ci')
import torch, bench, minilearner as ml
torch.set_num_threads(1)
torch.manual_seed(0)
device = torch.device({device!r})
model = torch.nn.Sequential(*[m for _ in range(4) for m in (torch.nn.Linear(1500, 1500), torch.nn.ReLU())], torch.nn.Linear(1500, 10)).to(device)
ready = bench.batches(4, {rows}, 1500, device)
if {ours}:
    bench.learner(model, ready, ready, torch.optim.SGD, device).fit(3)
else:
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        bench.plain_train(model, opt, ready), bench.plain_valid(model, ready)
print(torch.cuda.max_memory_allocated() if device.type == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def bench_memory(args):
    def peak(ours):
        code = MEMORY.format(root=str(ROOT), device=str(args.device), ours=ours, rows=250 if args.quick else 4000)
        # each tensor gets pages of its own and gives them back: what is left is what is in use
        env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536'}
        return int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env).stdout)
    show('memory: peak', [peak(True) / peak(False) for _ in range(1 if args.quick else 3)], '<= 1.02')


def bench_growth(args):
    """Batches per second by number of parameter tensors and of batches an epoch; what is kept of each batch."""
    def run(twin, n):
        torch.manual_seed(0)
        ready = batches(1, 16, 8, args.device) * n
        opt = torch.optim.SGD(twin.parameters(), lr=1e-3)
        learn = learner(copy.deepcopy(twin), ready[:100], None, torch.optim.SGD, args.device)
        learn.fit(1), plain_train(twin, opt, ready[:100])
        learn.dls.train = ready
        before = resident()
        ours = seconds(lambda: learn.fit(1), args.device)
        kept = resident() - before
        times = [(ours, seconds(lambda: plain_train(twin, opt, ready), args.device))]
        for _ in range(0 if n >= 10_000 else 6):    # a short one varies more
            times.append((seconds(lambda: learn.fit(1), args.device),
                          seconds(lambda: plain_train(twin, opt, ready), args.device)))
        return *map(statistics.median, zip(*times)), kept

    for n_layers, n in [(5, 1000), (5, 10_000 if args.quick else 100_000), (500, 100 if args.quick else 1000)]:
        layers = [nn.Linear(8, 8) for _ in range(n_layers - 1)] + [nn.Linear(8, 10)]
        ours, by_hand, kept = run(nn.Sequential(*layers).to(args.device), n)
        memory = f'; {kept / n:,.0f} bytes kept per batch' if n >= 10_000 else ''     # of fewer, it is noise
        print(f"{f'growth: {2 * n_layers} tensors, {n:,} batches':44} Learner {n / ours:,.0f}, by hand "
              f"{n / by_hand:,.0f} batches/s{memory}", flush=True)


def resident():
    """Bytes of memory that the process has in use; NaN where there is no /proc."""
    if sys.platform != 'linux':
        return float('nan')
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def bench_import(args):
    def start(what):
        begin = time.perf_counter()
        subprocess.run([sys.executable, '-c', f'import {what}'], check=True, cwd=ROOT)
        return time.perf_counter() - begin
    start('minilearner'), start('torch')
    show('import: against torch', [start('minilearner') / start('torch') for _ in range(1 if args.quick else 9)], '<= 1.05')


# ------------------------------------------------------------------------- other libraries

def with_fastai(ready):
    import fastai.callback.progress     # it adds no_bar to the Learner
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as Loader
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper

    class Ready(Loader):
        def __iter__(self):
            return iter(ready)

        def __len__(self):
            return len(ready)
    dls = DataLoaders(Ready(ready), Ready(ready))
    learn = Learner(dls, mlp(), loss_func=F.cross_entropy, metrics=accuracy, lr=1e-3,
                    opt_func=lambda params, **kw: OptimWrapper(params, torch.optim.SGD, lr=1e-3))

    def run():
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
    return run


def with_lightning(ready):
    import lightning
    import logging
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = mlp()

        def training_step(self, batch, i):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.log('train_loss', loss, on_epoch=True, on_step=False)
            return loss

        def validation_step(self, batch, i):
            pred = self.model(batch[0])
            self.log('valid_loss', F.cross_entropy(pred, batch[1]))
            self.log('accuracy', (pred.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)
    module = Module()

    class Ready:        # a bare list would be taken for many loaders
        def __iter__(self):
            return iter(ready)

        def __len__(self):
            return len(ready)

    def run():
        trainer = lightning.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
        trainer.fit(module, Ready(), Ready())
    return run


def with_skorch(ready):
    import skorch

    class Ready:
        def __init__(self, *args, **kwargs):
            pass

        def __iter__(self):
            return iter(ready)
    net = skorch.NeuralNetClassifier(mlp, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=1e-3,
                                     max_epochs=1, iterator_train=Ready, iterator_valid=Ready, verbose=0,
                                     train_split=None, warm_start=True)
    x, y = torch.cat([b[0] for b in ready]), torch.cat([b[1] for b in ready])
    from skorch.helper import predefined_split
    net.set_params(train_split=predefined_split(TensorDataset(x, y)))
    return lambda: net.fit(x, y)


def with_ignite(ready):
    from ignite.engine import create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Accuracy, Loss, RunningAverage
    model = mlp()
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=1e-3), F.cross_entropy)
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, 'loss')
    evaluator = create_supervised_evaluator(model, {'accuracy': Accuracy(), 'loss': Loss(F.cross_entropy)})

    def run():
        trainer.run(ready, 1)
        evaluator.run(ready)
    return run


def with_accelerate(ready):
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    model = mlp()
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))

    def run():
        model.train()
        total = 0.
        for xb, yb in ready:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(xb), yb)
                accelerator.backward(loss)
                opt.step()
                opt.zero_grad()
            total += loss.detach()
        model.eval()
        sums = [0., 0.]
        with torch.no_grad():
            for xb, yb in ready:
                pred = model(xb)
                pred, yb = accelerator.gather_for_metrics((pred, yb))
                sums = [sums[0] + F.cross_entropy(pred, yb), sums[1] + (pred.argmax(1) == yb).float().mean()]
        return float(total), float(sums[0]), float(sums[1])
    return run


OTHERS = {'fastai': with_fastai, 'lightning': with_lightning, 'skorch': with_skorch,
          'ignite': with_ignite, 'accelerate': with_accelerate}


def bench_others(args):
    device = torch.device('cpu')
    ready = batches(50 if args.quick else 200, 64, 784, device)
    twin = mlp()
    opt = torch.optim.SGD(twin.parameters(), lr=1e-3)

    def by_hand():
        return plain_train(twin, opt, ready), plain_valid(twin, ready)
    learn = learner(mlp(), ready, ready, torch.optim.SGD, device)
    show('epoch on the MLP: minilearner', ratios(lambda: learn.fit(1), by_hand, args), 'the least')
    missing = [name for name in OTHERS if importlib.util.find_spec(name) is None]
    for name in [n for n in OTHERS if n not in missing]:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                run = OTHERS[name](ready)
                found = ratios(run, by_hand, args)
            package = {'ignite': 'pytorch-ignite'}.get(name, name)
            show(f'epoch on the MLP: {name} {importlib.metadata.version(package)}', found)
        except Exception as e:
            print(f'epoch on the MLP: {name} could not be run: {e!r}')
    if missing:
        print(f"epoch on the MLP: not installed: {', '.join(missing)}")


# growth comes first: what other parts have freed would be used again, and hide what is kept
PARTS = {'growth': bench_growth, 'loop': bench_loop, 'optimizer': bench_optimizer, 'data': bench_data,
         'reads': bench_reads, 'memory': bench_memory, 'import': bench_import, 'others': bench_others}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', metavar='part', help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument('--quick', action='store_true', help="fewer and shorter rounds")
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--rounds', type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings('ignore')
    args.rounds = args.rounds or (3 if args.quick else 9)
    name = torch.cuda.get_device_name() if args.device.type == 'cuda' else platform.machine()
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {name}, {os.cpu_count()} CPUs, "
          f"{args.threads} thread(s), {args.rounds} rounds")
    print(f"{'':44} {'min':>7} {'median':>7} {'max':>7}   figure")
    for part in args.parts or PARTS:
        PARTS[part](args)


if __name__ == '__main__':
    main()

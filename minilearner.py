# SPDX-License-Identifier: MIT
"""minilearner: the fastai Learner, rebuilt from scratch in one readable file.

What it is: a complete training loop on torch alone (matplotlib only where it draws),
to be read once, from top to bottom. Each definition uses only what stands above it,
except that a method of `Learner` may hand over to a function further down. Cut the file
at any banner, and what stands above still works.
What it is not: augmentation, a model zoo, typed transforms. fastai has those.

    train, test = mnist1d()
    dls = DataLoaders.from_tensors(*train, valid=test)
    learn = Learner(dls, small_cnn(), nn.CrossEntropyLoss(), metrics=accuracy)
    learn.fit_one_cycle(5, 1e-2)

Map
     1  The plain loop   what everything below replaces, piece by piece
     2  Small tools      lists, names, devices, batches, seeds
     3  Data             TensorLoader, DataLoaders, mnist1d
     4  Optimizer        step functions, Optimizer, SGD, RMSProp, Adam, OptimWrapper
     5  Callbacks        events, Cancel exceptions, Callback, TrainEvalCallback
     6  Learner          the loop itself
     7  Metrics          AvgMetric, AvgLoss, accuracy
     8  Recorder         history, progress, plots
     9  Schedules        annealers, fit_one_cycle, fine_tune, lr_find
    10  Inference        validate, get_preds, predict, show_results, tta
    11  Saving           save_model, load_model, export
    12  A shelf          callbacks to take: early stopping, clipping, accumulation
    13  Many processes   several GPUs, or several CPU cores
    14  Demo             python minilearner.py

Glossary (B is the batch size, C the number of classes)
    batch       what a loader yields: a tensor, or inputs and targets, such as `(x, y)`
    xb, yb      inputs and targets of a batch, always tuples: `model(*xb)`
    x, y        the same, without the tuple if it has one element
    pred, loss  `model(*xb)`, and `loss_func(pred, *yb)`, a 0-d tensor
    ds, dl, dls a data set (`ds[0]` is a sample); a loader, anything that can be looped
                over again and again; a `DataLoaders`
    n_inp       how many items of a batch are inputs: 2 for `(x1, x2, y)`
    group       parameters that share hyper-parameters: `[body_params, head_params]`
    hypers      the hyper-parameters of a group: `{'lr': 0.1, 'mom': 0.9}`
    wd, mom     weight decay, momentum; `sqr_mom`: momentum of the squared gradients
    state       what is remembered of one parameter: `{'grad_avg': tensor, 'step': 3}`
    event       a moment of the loop, such as `after_loss`
    cb, cbs     a callback, an object with methods named after events; a list of them
    n_epoch     epochs of this fit; an epoch trains on all data once, then validates
    n_iter      batches of this pass over a loader
    pct_train   the share of the fit that is done, from 0.0 to 1.0

Sources: fastai's documentation of its Learner, fastbook chapters 16 and 19, and the
papers that the docstrings name. The code is written anew.
"""
import argparse
import copy
import difflib
import functools
import inspect
import itertools
import math
import operator
import os
import pickle
import random
import re
import shutil
import sys
import time
import types
import warnings
import zipfile
from collections import ChainMap, OrderedDict, defaultdict, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import data as data_tools

# --------------------------------------------------------------------------------------
# 1. The plain loop: everything below replaces one hard-coded part of it
#    Needs: nothing. Tested by: lesson 1.
# --------------------------------------------------------------------------------------

def fit_plain(model, train, valid, loss_func, opt, n_epoch):
    """Train `model` for `n_epoch` epochs with a hand-written loop.

    train, valid: lists or loaders of batches `(xb, yb)`, on the device of the model.
    opt: anything with `step()` and `zero_grad()`, such as a torch optimizer.
    Returns: the validation loss of each epoch, the mean over all samples; floats.
    Source: fastbook chapters 4 and 16.
    """
    valid_losses = []
    for _ in range(n_epoch):
        model.train()
        for xb, yb in train:
            loss = loss_func(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
        model.eval()
        total, count = 0., 0
        with torch.no_grad():
            for xb, yb in valid:
                total += loss_func(model(xb), yb) * len(xb)
                count += len(xb)
        valid_losses.append(float(total / count))
    return valid_losses

# --------------------------------------------------------------------------------------
# 2. Small tools: lists, names, devices, batches, seeds
#    Needs: nothing. Tested by: lesson 2.
# --------------------------------------------------------------------------------------

# `callbacks` is read whenever a Learner is made; sections 5 and 8 fill it.
defaults = types.SimpleNamespace(lr=1e-3, callbacks=[])

def check(ok, message, error=ValueError):
    """Raise `error(message)` unless `ok`: how this file refuses bad input."""
    if not ok:
        raise error(message)

def check_not_negative(name, value):
    """Raise ValueError unless `value`, or each of a list or slice, is at least 0.

    None passes, NaN does not. The message begins with `name=value`.
    """
    is_slice = isinstance(value, slice)
    values = [value.start or 0, value.stop] if is_slice else listify(value)
    check(all(v >= 0 for v in values), f"{name}={value!r}: give a number of at least 0")

def add_note(error, text):
    """Append `text` to what a traceback of `error` shows (from Python 3.11 on)."""
    notes = getattr(error, '__notes__', [])
    error.__notes__ = notes if text in notes else [*notes, text]

def listify(o):
    """`o` as a new list: None is empty, a list or tuple its items, else one item."""
    return list(o) if isinstance(o, (list, tuple)) else [] if o is None else [o]

def detuplify(t):
    """The element of a tuple that has one; any other tuple as it is."""
    return t[0] if len(t) == 1 else t

def class2attr(obj, suffix):
    """Name of `obj`'s class in snake case, without `suffix`; all of it if none is left.

    >>> class TestTrainEvalCallback: pass
    >>> class2attr(TestTrainEvalCallback(), 'Callback')
    'test_train_eval'
    """
    name = type(obj).__name__.removesuffix(suffix) or suffix
    return re.sub('(?<=[a-z0-9])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])', '_', name).lower()

def replacing_yield(o, attr, val):
    """Set `o.attr` to `val`, yield, and put the old value back whatever happens.

    A generator: return it from a function under `contextlib.contextmanager`.
    """
    old = getattr(o, attr)
    try:
        yield setattr(o, attr, val)
    finally:
        setattr(o, attr, old)

def func_name(f):
    """Name of a function, also of one inside a `partial`; of an object, its class's."""
    f = getattr(f, 'func', f)
    return getattr(f, '__name__', class2attr(f, 'Metric'))

def plain_number(v):
    """`v` as a Python number if it is a tensor or array of one, else as it is."""
    return v.item() if hasattr(v, 'item') and math.prod(v.shape) == 1 else v

def default_device():
    """The best device at hand: CUDA, then Apple's MPS, then the CPU."""
    mps = 'mps' if torch.backends.mps.is_available() else 'cpu'
    return torch.device('cuda' if torch.cuda.is_available() else mps)

def map_tensors(f, b):
    """Apply `f` to every tensor in `b`: a tensor, or nested tuples, lists and dicts.

    The types stay, named tuples included; what is no tensor stays as it is.
    """
    if isinstance(b, torch.Tensor):
        return f(b)
    if isinstance(b, (tuple, list)):
        items = [map_tensors(f, o) for o in b]
        return type(b)(*items) if hasattr(b, '_fields') else type(b)(items)
    if isinstance(b, dict):
        return {k: map_tensors(f, v) for k, v in b.items()}
    return b

def to_device(b, device=None, non_blocking=False):
    """Move every tensor of a batch to `device` (default: `default_device()`)."""
    device = device or default_device()

    def move(t):    # the comparison costs less than a call that finds nothing to do
        return t if t.device == device else t.to(device, non_blocking=non_blocking)
    return map_tensors(move, b)

def without_graph(t):
    """`t`, cut from its graph if it has one."""
    return t.detach() if t.requires_grad else t

def n_processes():
    """How many processes train together: the size of torch's group, or 1."""
    dist = torch.distributed
    in_group = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if in_group else 1

def process_rank():
    """Number of this process in its group, from 0; 0 if there is no group."""
    return torch.distributed.get_rank() if n_processes() > 1 else 0

def gather_rows(t):
    """The rows `t` (B, ...) of all processes in one tensor; with one process, `t`.

    A tensor without dimensions counts as one row.
    """
    if n_processes() == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(n_processes())]
    torch.distributed.all_gather(parts, t.contiguous())
    return torch.cat(parts) if t.dim() else torch.stack(parts)

def to_detach(b, cpu=True, gather=True):
    """Cut every tensor of a batch from its graph.

    cpu: also move it to the CPU. gather: join the rows of all processes first; each
    must hold the same number.
    """
    def detach(t):
        t = gather_rows(t.detach()) if gather else t.detach()
        return t.cpu() if cpu else t
    return map_tensors(detach, b)

def to_detach_from_dl(learn, b, cpu=True, gather=True):
    """`to_detach` of the learner's current loader, if it has one, else the function."""
    return getattr(learn.dl, 'to_detach', to_detach)(b, cpu=cpu, gather=gather)

def first_item(b):
    """What comes first in `b`, in the innermost of nested tuples, lists and dicts."""
    while isinstance(b, (tuple, list, dict)) and b:
        b = next(iter(b.values())) if isinstance(b, dict) else b[0]
    return b

def find_bs(b):
    """Batch size of `b`: the rows of its first item; 1 without a shape."""
    shape = getattr(first_item(b), 'shape', ())
    return shape[0] if shape else 1

def set_seed(s, reproducible=False):
    """Seed Python, NumPy (if imported) and torch, on all devices, with the int `s`.

    reproducible: ask cuDNN for deterministic kernels, which may be slower.
    On the CPU, two runs with the same torch and number of threads are then equal to the
    last bit, shuffling and dropout included. Not covered: CUDA kernels that add in any
    order (see `torch.use_deterministic_algorithms`), and NumPy or Python numbers drawn
    in worker processes.
    """
    random.seed(s)
    torch.manual_seed(s)
    if 'numpy' in sys.modules:
        sys.modules['numpy'].random.seed(s % 2**32)
    if reproducible:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

def rng_state():
    """State of all random number generators that `set_seed` seeds: plain values."""
    state = {'python': random.getstate(), 'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state_all()
    if 'numpy' in sys.modules:
        kind, keys, *rest = sys.modules['numpy'].random.get_state()
        state['numpy'] = (kind, keys.tolist(), *rest)
    return state

def set_rng_state(state):
    """Go back to what `rng_state` returned, for the generators that are here, too."""
    random.setstate(state['python'])
    torch.set_rng_state(state['torch'])
    if len(state.get('cuda', ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state.get('cuda', []))
    if 'numpy' in state and 'numpy' in sys.modules:
        sys.modules['numpy'].random.set_state(state['numpy'])

def is_plain(o):
    """Whether a file can hold `o` and be read again without running code."""
    if type(o) in (list, tuple):
        return all(map(is_plain, o))
    if type(o) in (dict, OrderedDict):
        return all(is_plain(k) and is_plain(v) for k, v in o.items())
    return o is None or type(o) in (bool, int, float, str, torch.Tensor, nn.Parameter)

def trainable_params(model):
    """The parameters of `model` that require a gradient: a list, hence one group."""
    return [p for p in model.parameters() if p.requires_grad]

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

def norm_bias_params(model, with_bias=True):
    """List of the parameters of all norm layers and, if `with_bias`, all biases."""
    return [p for m in model.modules() for name, p in m.named_parameters(recurse=False)
            if isinstance(m, NORM_LAYERS) or (with_bias and 'bias' in name)]

# --------------------------------------------------------------------------------------
# 3. Data: loaders of batches, and a data set that needs no download
#    Needs: 2. Tested by: lesson 3.
# --------------------------------------------------------------------------------------

class TensorLoader:
    """Cuts batches from tensors in memory by one index each, not sample by sample.

    tensors: (N, ...) with the same N each, inputs first; on any device.
    bs: rows of a batch; the last may have fewer, or is left out by `drop_last`.
    shuffle: a new order each epoch, from torch's global generator of that device.
    dataset: a TensorDataset of them; bs, shuffle, drop_last are attributes, too.
    Yields: tuples of tensors (B, ...); they are copies. Raises: ValueError.

    >>> [b[0].tolist() for b in TensorLoader(torch.arange(5), bs=2)]
    [[0, 1], [2, 3], [4]]
    """
    def __init__(self, *tensors, bs=64, shuffle=False, drop_last=False):
        lengths = [len(t) for t in tensors]
        check(len(set(lengths)) == 1, f"tensors of {lengths} rows: make them equal")
        check(bs >= 1, f"bs={bs}: a batch needs at least 1 row")
        self.dataset = data_tools.TensorDataset(*tensors)
        self.bs, self.shuffle, self.drop_last = bs, shuffle, drop_last

    def __len__(self):
        full, rest = divmod(len(self.dataset), self.bs)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self):
        tensors = self.dataset.tensors
        make_order = torch.randperm if self.shuffle else torch.arange
        order = make_order(len(self.dataset), device=tensors[0].device)
        for rows in order.split(self.bs)[:len(self)]:
            yield tuple(t.index_select(0, rows) for t in tensors)

class DataLoaders:
    """The loaders of a training: `dls[0]` is `dls.train`, `dls[1]` is `dls.valid`.

    loaders: torch DataLoaders, TensorLoaders, lists of batches: whatever can be looped
      over again and again. Without a second one, or with None, nothing is validated.
    path: folder of the project.
    device: where the Learner sends batches; default: `default_device()`.
    n_inp: how many items of a batch are inputs; default: `train.n_inp`, if it has that,
      else all but the last item.
    vocab: names of the classes, by number.
    decode: function from a decoded prediction to what a person reads; wins over vocab.
    What is no attribute here is looked up in `train`.
    Raises: TypeError without a training loader, or for one that can be read only once.
    """
    def __init__(self, *loaders, path='.', device=None, n_inp=None, vocab=None,
                 decode=None):
        self.loaders = list(loaders)
        if not loaders or loaders[0] is None:
            raise TypeError("no training loader: write DataLoaders(train, valid)")
        if any(isinstance(dl, Iterator) for dl in loaders):
            raise TypeError("an iterator serves one epoch: pass a list or a DataLoader")
        self.train, self.valid = (self.loaders + [None])[:2]
        self.train_ds, self.valid_ds = (getattr(dl, 'dataset', None)
                                        for dl in (self.train, self.valid))
        self.path, self.device = Path(path), torch.device(device or default_device())
        self.n_inp = n_inp or getattr(self.train, 'n_inp', None)
        self.vocab, self.decode = vocab, decode

    @classmethod
    def from_tensors(cls, x, y, valid=None, valid_pct=0.2, bs=64, seed=None,
                     shuffle=True, drop_last=False, device=None, **kwargs):
        """DataLoaders over tensors x, y (N, ...), which move to the device as a whole.

        valid: a pair of tensors; default: rows of x and y, left out of the training.
        valid_pct: their share, from 0 (no validation) to below 1.
        seed: an int that decides which ones; default: the global generator decides.
        shuffle, drop_last: of the training loader.
        kwargs: see `DataLoaders`.
        """
        check(0 <= valid_pct < 1, f"valid_pct={valid_pct}: a share from 0 to below 1")
        if valid is None and valid_pct:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            order = torch.randperm(len(x), generator=generator).to(x.device)
            rest, held_out = order.tensor_split([round(len(x) * (1 - valid_pct))])
            x, y, valid = x[rest], y[rest], (x[held_out], y[held_out])
        train = TensorLoader(x, y, bs=bs, shuffle=shuffle, drop_last=drop_last)
        dls = cls(train, valid and TensorLoader(*valid, bs=bs), device=device, **kwargs)
        return dls.to(dls.device)

    @classmethod
    def from_dsets(cls, train_ds, valid_ds=None, bs=64, shuffle=True, device=None,
                   **kwargs):
        """DataLoaders over data sets, through torch DataLoaders, which get `kwargs`."""
        train = data_tools.DataLoader(train_ds, bs, shuffle, **kwargs)
        if valid_ds is None:
            return cls(train, device=device)
        kwargs.update(drop_last=False, sampler=None)
        valid = data_tools.DataLoader(valid_ds, bs, **kwargs)
        return cls(train, valid, device=device)

    def __getitem__(self, i):
        return self.loaders[i]

    def __getattr__(self, k):
        # subtle: copy and pickle ask before __init__ ran, when `train` is missing, too
        if 'train' not in self.__dict__ or k.startswith('__'):
            raise AttributeError(k)
        return getattr(self.train, k)

    def split_batch(self, b):
        """Split a batch into the tuples `(xb, yb)`; override it for other kinds.

        Raises: TypeError for a dict, whose items have no order.
        """
        if isinstance(b, dict):
            raise TypeError(f"dict batch {list(b)}: override DataLoaders.split_batch")
        b = tuple(b) if isinstance(b, (tuple, list)) else (b,)
        n = self.n_inp or max(1, len(b) - 1)
        return b[:n], b[n:]

    def one_batch(self):
        """The first batch of a new pass over the training loader, on the device."""
        return to_device(next(iter(self.train)), self.device)

    def show_batch(self, max_n=9, ax=None):
        """Draw up to `max_n` samples of a training batch; see `show_samples`."""
        xb, yb = self.split_batch(self.one_batch())
        titles = [self.decoded(y) for y in yb[0]] if yb else None
        return show_samples(xb[0][:max_n], titles, ax)

    def decoded(self, y):
        """What a person reads for one target or decoded prediction `y`."""
        if self.decode:
            return self.decode(y)
        y = plain_number(y)
        return self.vocab[y] if self.vocab is not None and isinstance(y, int) else y

    def to(self, device):
        """Send batches to `device` from now on; tensors in memory move at once."""
        self.device = torch.device(device)
        for dl in self.loaders:
            if isinstance(dl, TensorLoader):
                dl.dataset.tensors = to_device(dl.dataset.tensors, self.device)
        return self

    cuda, cpu = functools.partialmethod(to, 'cuda'), functools.partialmethod(to, 'cpu')

def parts_of(dl):
    """`dl` and what chooses its rows: any of them may draw random numbers."""
    batch_sampler = getattr(dl, 'batch_sampler', None)
    samplers = [getattr(o, 'sampler', None) for o in (dl, batch_sampler)]
    return [dl, batch_sampler, *samplers]

def generators_of(dl):
    """The generators that a torch DataLoader, or a part of it, was given."""
    found = [getattr(part, 'generator', None) for part in parts_of(dl)]
    return [g for g in found if isinstance(g, torch.Generator)]

def show_samples(xs, titles=None, ax=None):
    """Draw samples, each with its title; returns the array of matplotlib axes.

    ax: an array of axes, at least one per sample; default: a square grid.
    xs: signals (B, L) or (B, 1, L), drawn as lines; or images (B, H, W), (B, C, H, W).
    """
    import matplotlib.pyplot as plt
    axs, side = ax, math.ceil(math.sqrt(len(xs)))
    if axs is None:
        figure = plt.figure(figsize=[1 + 1.5 * side] * 2, layout='constrained')
        axs = figure.subplots(side, side, squeeze=False)
    for i, ax in enumerate(axs.flat):
        ax.set(xticks=[], yticks=[], visible=i < len(xs))
    for ax, x, title in zip(axs.flat, xs, titles or [''] * len(xs)):
        x = x.detach().float().cpu().squeeze()
        draw = functools.partial(ax.imshow, cmap='gray') if x.dim() > 1 else ax.plot
        draw((x.movedim(0, -1) if x.dim() == 3 else x).numpy())
        ax.set_title(title, fontsize=9)
    return axs

# The ten hand-drawn shapes of MNIST-1D (arXiv:2011.14439), 12 points each
MNIST1D_SHAPES = """
    5 6 6.5 6.75 7 7 7 7 6.75 6.5 6 5       5 3 3 3.4 3.8 4.2 4.6 5 5.4 5.8 5 5
    5 6 6.5 6.5 6 5.25 4.75 4 3.5 3.5 4 5   5 6 6.5 6.5 6 5 5 6 6.5 6.5 6 5
    5 4.4 3.8 3.2 2.6 2.6 5 5 5 5 5 5       5 3 3 3 3 5 6 6.5 6.5 6 4.5 5
    5 4 3.5 3.25 3 3 3 3 3.25 3.5 4 5       5 7 7 6.6 6.2 5.8 5.4 5 4.6 4.2 5 5
    5 4 3.5 3.5 4 5 5 4 3.5 3.5 4 5         5 4 3.5 3.5 4 5 5 5 5 4.7 4.3 5"""

def mnist1d(n=5000, seed=42):
    """MNIST-1D, made on the spot: signals of 40 points in 10 classes of equal size.

    n: how many, a multiple of 10; the first four fifths are for training.
    seed: an int; the global random state is neither used nor changed.
    Returns: `(x, y), (x_test, y_test)`; x is (N, 1, 40) float32, y (N,) int64.
    Source: Greydanus and Kobak, 'Scaling down deep learning with MNIST-1D', ICML 2024.
    Test accuracy published there: logistic 32 %, MLP 68 %, CNN 94 %, GRU 91 %.
    """
    check(n > 0 and n % 10 == 0, f"n={n}: give a multiple of 10, for 10 equal classes")
    rng = torch.Generator().manual_seed(seed)
    rand = functools.partial(torch.rand, n, 1, generator=rng)
    y = torch.randperm(n, generator=rng) % 10
    shapes = torch.tensor([float(v) for v in MNIST1D_SHAPES.split()]).view(10, 12)
    shapes = (shapes - shapes.mean(1, True)) / shapes.std(1, correction=0, keepdim=True)
    shapes = (shapes - shapes[:, :1]) / 6 + 1e-8    # so that only padding is exactly 0
    x = F.pad(shapes, (0, 60))[y]
    # stretch the shape and a random length of padding over 72 points
    at = torch.linspace(0, 1, 72) * torch.randint(47, 72, (n, 1), generator=rng)
    left = at.long().clamp(max=70)
    x = torch.lerp(x.gather(1, left), x.gather(1, left + 1), at - left)
    x = x * (1 + 0.4 * (rand() - 0.5))
    x = x.gather(1, (torch.arange(72) - torch.randint(48, (n, 1), generator=rng)) % 72)
    # correlated noise in the padding, a little independent noise everywhere
    kernel = torch.exp(-torch.arange(-8, 9) ** 2 / 8)
    noise = 0.25 * torch.randn(n, 72, generator=rng)
    noise = torch.cat([noise[:, :8].flip(1), noise, noise[:, -8:].flip(1)], 1)
    noise = F.conv1d(noise[:, None], (kernel / kernel.sum())[None, None])[:, 0]
    x = torch.where(x == 0, noise, x) + 0.02 * torch.randn(n, 72, generator=rng)
    x = x - 0.75 * (rand() - 0.5) * torch.linspace(-0.5, 0.5, 72)
    x = F.interpolate(x[:, None], 40, mode='linear', align_corners=True)
    x, cut = (x - x.mean()) / x.std(correction=0), n * 4 // 5
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])

# --------------------------------------------------------------------------------------
# 4. Optimizer: a chain of small step functions makes any of them
#    Needs: 2. Tested by: lesson 4.
# --------------------------------------------------------------------------------------
# A step function takes a parameter `p` (its gradient is `p.grad`) and, by keyword, the
# hypers and the state that it needs; `**kwargs` swallows the others. It changes `p` in
# place, or returns a dict with new state for `p`, or both. The state that it returns is
# an optional argument of its own, as in `grad_avg=None`: so it starts. A Learner takes
# it by opt_func=functools.partial(Optimizer, cbs=[weight_decay, your_step], wd=0.01).

def sgd_step(p, lr, **kwargs):
    """p -= lr * grad"""
    p.data.add_(p.grad.data, alpha=-lr)

def weight_decay(p, lr, wd, do_wd=True, **kwargs):
    """p *= 1 - lr * wd. Source: Loshchilov, Hutter, 'Decoupled Weight Decay', 2019."""
    if do_wd and wd != 0:
        p.data.mul_(1 - lr * wd)

def l2_reg(p, lr, wd, do_wd=True, **kwargs):
    """grad += wd * p, as if the loss had a penalty wd / 2 * p**2."""
    if do_wd and wd != 0:
        p.grad.data.add_(p.data, alpha=wd)

def average_grad(p, mom, dampening=False, grad_avg=None, **kwargs):
    """grad_avg = mom * grad_avg + grad, from 0; with dampening: + (1 - mom) * grad."""
    if grad_avg is None:
        grad_avg = torch.zeros_like(p.grad.data)
    return {'grad_avg': grad_avg.mul_(mom).add_(p.grad.data, alpha=1 - dampening * mom)}

def average_sqr_grad(p, sqr_mom, dampening=True, sqr_avg=None, **kwargs):
    """sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * grad**2; undamped: + grad**2."""
    if sqr_avg is None:
        sqr_avg = torch.zeros_like(p.grad.data)
    grad, damp = p.grad.data, 1 - dampening * sqr_mom
    sqr_avg.mul_(sqr_mom).addcmul_(grad, grad, value=damp)
    return {'sqr_avg': sqr_avg}

def momentum_step(p, lr, grad_avg, **kwargs):
    """p -= lr * grad_avg"""
    p.data.add_(grad_avg, alpha=-lr)

def rms_prop_step(p, lr, sqr_avg, eps, grad_avg=None, **kwargs):
    """p -= lr * (grad_avg or grad) / (sqrt(sqr_avg) + eps). Source: Hinton, 2012."""
    direction = p.grad.data if grad_avg is None else grad_avg
    p.data.addcdiv_(direction, sqr_avg.sqrt().add_(eps), value=-lr)

def step_stat(p, step=0, **kwargs):
    """Count the steps of `p`, from 1."""
    return {'step': step + 1}

def debias(mom, damp, step):
    """Sum of the weights in a moving average from 0 after `step` steps: divide by it.

    >>> round(debias(0.9, 0.1, 2), 2)       # 0.1 for this gradient, 0.09 for the last
    0.19
    """
    return damp * (1 - mom**step) / (1 - mom)

def adam_step(p, lr, mom, step, sqr_mom, grad_avg, sqr_avg, eps, **kwargs):
    """p -= lr * g / (sqrt(s) + eps), where g and s are grad_avg and sqr_avg, debiased.

    Source: Kingma and Ba, 'Adam: A Method for Stochastic Optimization', 2015.
    """
    debias1, debias2 = debias(mom, 1 - mom, step), debias(sqr_mom, 1 - sqr_mom, step)
    denom = (sqr_avg / debias2).sqrt_().add_(eps)
    p.data.addcdiv_(grad_avg, denom, value=-lr / debias1)

class TensorList:
    """Many tensors that answer to the methods of one, by torch's multi-tensor kernels.

    So a step function updates a whole group in a few calls, each of which costs little
    more than that for a single parameter. `t.add_(u, alpha=2)` is
    `torch._foreach_add_(t.tensors, u.tensors, alpha=2)`, to the same last bit.
    """
    def __init__(self, tensors):
        self.tensors = tensors

    def __getattr__(self, name):
        multi = getattr(torch, f'_foreach_{name}')

        def method(*args, **kwargs):
            args = [getattr(a, 'tensors', a) for a in args]
            result = multi(self.tensors, *args, **kwargs)
            return self if name.endswith('_') else TensorList(result)
        return method

    def __truediv__(self, number):
        return self.div(number)

    data = property(lambda self: self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return cls([func(t, **(kwargs or {})) for t in args[0].tensors])

class StackedParams(TensorList):
    """Parameters with the same hypers and the same kind of state, as one."""
    grad = property(lambda self: TensorList([p.grad for p in self.tensors]))

class StackedState(dict):
    """Their states as one; what a step function changes goes back to each of them."""
    def __init__(self, states):
        self.states = states
        super().__init__((k, TensorList([state[k] for state in states])
                          if isinstance(v, torch.Tensor) else v)
                         for k, v in states[0].items())

    def update(self, new):
        """Keep `new`, here and in the states of all parameters."""
        super().update(new)
        for k, v in new.items():
            values = v.tensors if isinstance(v, TensorList) else [v] * len(self.states)
            for state, value in zip(self.states, values):
                state[k] = value

# These work on a TensorList as on a tensor; with any other, it goes one by one.
FAST_STEPS = (sgd_step, weight_decay, l2_reg, average_grad, average_sqr_grad,
              momentum_step, rms_prop_step, step_stat, adam_step)
HALF = (torch.float16, torch.bfloat16)

def is_fast(f):
    """Whether `f`, or what it is a `partial` of, is one of FAST_STEPS."""
    return (f.func if isinstance(f, functools.partial) else f) in FAST_STEPS

def stack_params(params):
    """Join the items of `Optimizer.all_params` that can be updated as one."""
    alike = defaultdict(list)
    for item in params:
        p, _, state, hyper = item
        tensors = [v for v in state.values() if isinstance(v, torch.Tensor)]
        plain = [v if isinstance(v, (int, float, str)) else id(v)
                 for v in state.values() if not isinstance(v, torch.Tensor)]
        # on a CPU, half precision is rounded in another way if many come together
        halves = p.is_cpu and any(t.dtype in HALF for t in (p, *tensors))
        key = (id(hyper), p.device, p.dtype, *state, *plain, halves and id(p))
        alike[key].append(item)
    return [(StackedParams([p for p, *_ in items]), group,
             StackedState([state for _, _, state, _ in items]), hyper)
            if len(items) > 1 else items[0]
            for items in alike.values() for _, group, _, hyper in items[:1]]

class Optimizer:
    """Runs step functions, one after another, on every parameter that has a gradient.

    params: parameters (one group), or iterables of them (groups), or a single tensor.
    cbs: a step function or a list; an attribute `defaults` of one is a dict of hypers.
    train_bn: unused, as in fastai; it is the Learner that marks norm layers.
    defaults: hypers of all groups; they override those of the step functions.
    Raises: ValueError for a parameter given twice; and at the first step, before any
    weight moves, for a hyper that a step function needs and nobody gave.
    Source: fastbook chapter 16.

    >>> Optimizer([1, 2, 3], sgd_step, lr=0.1).hypers
    [{'lr': 0.1}]
    """
    def __init__(self, params, cbs, train_bn=True, **defaults):
        self.cbs, self.param_lists = listify(cbs), as_groups(params)
        self.hypers, self.state = [{} for _ in self.param_lists], defaultdict(dict)
        self.frozen_idx, self._checked = 0, False
        for f in self.cbs:
            # subtle: a partial of a step function has no `defaults`, its function has
            self.set_hypers(**getattr(getattr(f, 'func', f), 'defaults', {}))
        self.set_hypers(**defaults)

    @property
    def param_groups(self):
        """`[{'params': [...], 'lr': ...}, ...]` as in torch; writes reach `hypers`."""
        groups = zip(self.param_lists, self.hypers)
        return [ChainMap(hyper, {'params': group}) for group, hyper in groups]

    @param_groups.setter
    def param_groups(self, groups):
        """Replace parameters and hypers."""
        self.param_lists = [list(g['params']) for g in groups]
        self.hypers = [{k: v for k, v in g.items() if k != 'params'} for g in groups]

    def all_params(self, n=slice(None), with_grad=False):
        """List of `(p, group, state, hyper)` over the groups in the slice `n`."""
        return [(p, group, self.state[p], hyper)
                for group, hyper in zip(self.param_lists[n], self.hypers[n])
                for p in group if not with_grad or p.grad is not None]

    def per_group(self, k, v):
        """The list of values, one a group, that `v` stands for; see `set_hyper`."""
        n = len(self.param_lists)
        values = v if isinstance(v, (list, tuple)) else [v] * n
        if isinstance(v, slice) and v.start is None:
            values = [v.stop / 10] * (n - 1) + [v.stop]
        elif isinstance(v, slice):
            check(v.start > 0 and v.stop > 0, f"{k}={v}: both ends must be above 0")
            # steps back from the last group, so that a single group gets v.stop
            back = [(n - 1 - i) / max(1, n - 1) for i in range(n)]
            values = [v.stop * (v.start / v.stop) ** step for step in back]
        values = [plain_number(value) for value in values]
        ok = len(values) == n and not hasattr(values[0], 'shape')
        check(ok, f"{k}={v!r}, for {n} group(s): give a number, or a list of {n}")
        return values

    def set_hyper(self, k, v):
        """Set hyper `k` to `v`: one value for all groups, or a list with one per group.

        v may be `slice(a, b)`: a for the first group, b for the last, equal factors in
        between; or `slice(b)`: b for the last group, b / 10 for the others.
        Tensors and NumPy numbers of one element become plain numbers.
        Raises: ValueError for a list of another length, an array, a slice whose ends
        are not above 0, or a learning rate or weight decay below 0.
        """
        values = self.per_group(k, v)
        if k in ('lr', 'wd'):
            check_not_negative(k, values)
        for i, value in enumerate(values):
            self._set(i, k, value)

    def _set(self, i, k, value):
        self.hypers[i][k] = value

    def set_hypers(self, **kwargs):
        """`set_hyper` for every keyword."""
        for k, v in kwargs.items():
            self.set_hyper(k, v)

    @torch.no_grad()
    def step(self):
        """Run the step functions on every parameter that has a gradient."""
        params = self.all_params(with_grad=True)
        if params and not self._checked:
            self._check_hypers(*params[0])
        if len(params) > 8 and all(map(is_fast, self.cbs)):    # few are fast anyway
            params = stack_params(params)
        for p, _, state, hyper in params:
            self._update(p, state, hyper)

    def _update(self, p, state, hyper):
        for f in self.cbs:
            state.update(f(p, **{**state, **hyper}) or {})

    def _check_hypers(self, p, group, state, hyper):
        """Find what is missing before a weight moves; if in doubt, try on a copy."""
        known, doubtful = set(self.hypers[0]).union(*self.state.values()), set()
        for f in self.cbs:
            _, *args = inspect.signature(f).parameters.values()    # all but p
            args = [a for a in args if a.kind not in (a.VAR_KEYWORD, a.VAR_POSITIONAL)]
            doubtful |= {a.name for a in args if a.default is a.empty} - known
            known |= {a.name for a in args}
        if doubtful:
            trial = p.detach().clone()
            trial.grad = p.grad.detach().clone()
            try:
                self._update(trial, map_tensors(torch.clone, state), hyper)
            except TypeError as e:
                raise ValueError(f"{e}: give this hyper to the Optimizer, or put the "
                                 "function that keeps this state in front") from e
        self._checked = True

    def zero_grad(self, set_to_none=True):
        """Forget all gradients; `set_to_none=False` fills them with 0 instead."""
        for group in self.param_lists:
            for p in group:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad.detach_().zero_()

    def freeze_to(self, n):
        """Train only the groups from `n` on (negative: counted from the end).

        Parameters whose state has `force_train` train in any case; frozen ones lose
        their gradient. frozen_idx is then the first group that trains; at first 0.
        Warns if that freezes all groups.
        """
        n_groups = len(self.param_lists)
        self.frozen_idx = max(0, n if n >= 0 else n_groups + n)
        if self.frozen_idx >= n_groups:
            warnings.warn(f"freeze_to({n}) freezes all {n_groups} parameter group(s)")
        for i, group in enumerate(self.param_lists):
            for p in group:
                p.requires_grad_(i >= self.frozen_idx or 'force_train' in self.state[p])
                if not p.requires_grad:
                    p.grad = None    # or one more step would move it

    def freeze(self):
        """Train only the last group. Raises: ValueError if it is the only one."""
        ok = len(self.param_lists) > 1
        check(ok, "freeze with 1 parameter group: pass a splitter that makes 2 or more")
        self.freeze_to(-1)

    def unfreeze(self):
        """Train all groups."""
        self.freeze_to(0)

    def clear_state(self):
        """Forget all state but the marks `force_train` and `do_wd`."""
        marks = ('force_train', 'do_wd')
        for p, _, state, _ in self.all_params():
            self.state[p] = {k: v for k, v in state.items() if k in marks}

    def state_dict(self):
        """`{'state': [a dict per parameter], 'hypers': [one per group]}`, no copies."""
        states = [state for _, _, state, _ in self.all_params()]
        return {'state': states, 'hypers': self.hypers}

    def load_state_dict(self, sd):
        """Take over copies of what `state_dict` gave, on the devices of the parameters.

        Raises: ValueError, before any change, for the state of another optimizer.
        """
        check_state_fits(self, sd.get('hypers', []), sd.get('state', []))
        self.restore(sd)

    def restore(self, sd):
        """`load_state_dict` for what this very optimizer gave: nothing is checked."""
        for (p, *_), state in zip(self.all_params(), sd['state']):
            self.state[p] = map_tensors(lambda t: t.to(p.device, copy=True), state)
        self.hypers = [{**own, **h} for own, h in zip(self.hypers, sd['hypers'])]

def check_state_fits(opt, hypers, states):
    """Raise ValueError unless hypers (one dict a group), states (a parameter) fit.

    A state has the sizes of its parameter, or 1 in their place.
    """
    params = [p for p, *_ in opt.all_params()]
    found, own = (len(hypers), len(states)), (len(opt.hypers), len(params))
    check(found == own, f"its numbers of groups and parameters are {found}, here {own}")
    for a, b in zip(hypers, opt.hypers):
        differ = (a.keys() ^ b.keys()) - {'mom', 'wd'}    # these a fit may add
        check(not differ, f"one of the two optimizers has no {sorted(differ)}")
    for p, state in zip(params, states):
        shapes = [v.shape for v in state.values() if isinstance(v, torch.Tensor)]
        ok = all(len(shape) <= p.dim() for shape in shapes)
        # a state may be smaller, such as one number for each row
        ok = ok and all(n in (1, m) for shape in shapes
                        for n, m in zip(reversed(shape), reversed(p.shape)))
        check(ok, f"it has a state of another shape for a parameter {list(p.shape)}")

def as_groups(params):
    """Lists of parameters from parameters, iterables of them, or a single tensor."""
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    is_one = [isinstance(p, torch.Tensor) or not hasattr(p, '__iter__') for p in params]
    groups = [params] if any(is_one) or not params else [list(p) for p in params]
    ids = [id(p) for group in groups for p in group]
    check(len(set(ids)) == len(ids), "a parameter is given twice: once is enough")
    return groups

def SGD(params, lr, mom=0., wd=0., decouple_wd=True):
    """Optimizer: gradient descent with momentum `mom` (0 to 1) and weight decay `wd`.

    Equals torch.optim.SGD, whose weight_decay is the `wd` of `decouple_wd=False`.
    """
    steps = [average_grad, momentum_step] if mom else [sgd_step]
    steps.insert(0, weight_decay if decouple_wd else l2_reg)
    return Optimizer(params, steps, lr=lr, mom=mom, wd=wd)

def RMSProp(params, lr, sqr_mom=0.99, mom=0., wd=0., decouple_wd=True, eps=1e-8):
    """Optimizer: divides each weight's step by the recent size of its gradients.

    Equals torch.optim.RMSprop without momentum. With it the two differ: here gradients
    are averaged, then divided; torch averages what it has divided.
    """
    steps = [*([average_grad] if mom else []), average_sqr_grad, rms_prop_step]
    steps.insert(0, weight_decay if decouple_wd else l2_reg)
    return Optimizer(params, steps, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

def Adam(params, lr, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.01, decouple_wd=True):
    """Optimizer: momentum and RMSProp together, with both averages debiased.

    Equals torch.optim.AdamW, or Adam for `decouple_wd=False`; betas are mom, sqr_mom.
    """
    damped_average = functools.partial(average_grad, dampening=True)
    steps = [damped_average, average_sqr_grad, step_stat, adam_step]
    steps.insert(0, weight_decay if decouple_wd else l2_reg)
    return Optimizer(params, steps, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

class OptimWrapper(Optimizer):
    """A torch optimizer with the interface of `Optimizer`: schedules, freezing, saving.

    params: as in `Optimizer`, or torch's dict groups, or (alone) a torch optimizer.
    opt: a torch optimizer, its class, or a `partial` of that; kwargs go to the class.
    hp_map: torch's names of hypers to ours; `betas__0` is the first of `betas`.
    convert_groups: bring lists of groups into torch's form.
    A fit sets the rate of every group, also where dicts have one: give it a list.
    Marks such as `do_wd` have no effect: torch decays every parameter of a group.
    """
    hp_map = {'lr': 'lr', 'momentum': 'mom', 'betas__0': 'mom', 'weight_decay': 'wd',
              'alpha': 'sqr_mom', 'betas__1': 'sqr_mom', 'eps': 'eps'}

    def __init__(self, params=None, opt=None, hp_map=None, convert_groups=True,
                 **kwargs):
        opt, params = (params, None) if opt is None else (opt, params)
        ours = {k: kwargs.pop(k) for k in ('mom', 'wd', 'sqr_mom') if k in kwargs}
        if not isinstance(opt, torch.optim.Optimizer):
            params = params if isinstance(params, torch.Tensor) else list(params)
            if convert_groups and not isinstance(params[0], dict):
                params = [{'params': group} for group in as_groups(params)]
            opt = opt(params, **kwargs)
        self.opt, self.state, self.frozen_idx = opt, defaultdict(dict), 0
        self.hp_map = hp_map or self.hp_map
        self.set_hypers(**ours)

    param_groups = property(lambda self: self.opt.param_groups)
    param_lists = property(lambda self: [g['params'] for g in self.opt.param_groups])

    @property
    def hypers(self):
        """A dict per group, under our names: copies; `set_hyper` writes through."""
        return [self._hypers_of(group) for group in self.opt.param_groups]

    def _hypers_of(self, group):
        return {ours: group[key][int(i[0])] if i else group[key]
                for ours, (key, *i) in self._places(group).items()}

    def _places(self, group):
        """Where `group` keeps our hypers: `{'mom': ['betas', '0'], 'lr': ['lr']}`."""
        places = [(ours, name.split('__')) for name, ours in self.hp_map.items()]
        return {ours: at for ours, at in places if at[0] in group}

    def _set(self, i, k, value):
        group = self.opt.param_groups[i]
        key, *item = self._places(group).get(k, [k])
        if item:
            value = tuple(value if j == int(item[0]) else old
                          for j, old in enumerate(group[key]))
        group[key] = value

    def step(self):
        """A step of the torch optimizer."""
        self.opt.step()

    def clear_state(self):
        """Forget what the torch optimizer remembers."""
        self.opt.state.clear()

    def state_dict(self):
        """That of the torch optimizer."""
        return self.opt.state_dict()

    def load_state_dict(self, sd):
        """Load what `state_dict` gave. Raises: ValueError if another kind gave it."""
        hypers = [self._hypers_of(group) for group in sd.get('param_groups', [])]
        states = [sd.get('state', {}).get(i, {}) for i in range(len(self.all_params()))]
        check_state_fits(self, hypers, states)
        self.restore(sd)

    def restore(self, sd):
        """`load_state_dict` for what this very optimizer gave: nothing is checked."""
        self.opt.load_state_dict(sd)

# --------------------------------------------------------------------------------------
# 5. Callbacks: code that steps into the loop at its events
#    Needs: 2. Tested by: lesson 5.
# --------------------------------------------------------------------------------------
#
#  before_fit
#     before_epoch
#        before_train
#           before_batch           there are xb and yb
#           after_pred             pred = model(*xb)
#           after_loss             loss = loss_func(pred, *yb); all that validation does
#              before_backward
#              after_backward      loss.backward()
#              before_step
#              after_step          opt.step(); the gradients are still there
#           after_batch            opt.zero_grad()
#        after_train
#        before_validate
#           (batches, as above)
#        after_validate
#     after_epoch
#  after_fit
#
# What has begun ends with its `after_...`, even if an error passes through. A Cancel
# exception ends a part early: then `after_cancel_...` comes just before `after_...`.
# Without targets (an empty yb) a batch has no loss, and nothing to learn from.
# `after_create` comes once, at the end of the Learner's __init__.
#
# A callback reads and changes what the Learner has: xb, yb (x, y), pred, loss; model,
# opt, dls, dl; epoch, n_epoch, iter, n_iter; training, train_iter, pct_train (set by
# TrainEvalCallback, order -10); completed: in `after_...`, whether that part ran to its
# end; smooth_loss, final_record (set by Recorder, order 50: whoever reads its newest
# row in after_epoch needs an order above that).

EVENTS = tuple("""after_create before_fit before_epoch before_train before_batch
    after_pred after_loss before_backward after_cancel_backward after_backward
    before_step after_cancel_step after_step after_cancel_batch after_batch
    after_cancel_train after_train before_validate after_cancel_validate after_validate
    after_cancel_epoch after_epoch after_cancel_fit after_fit""".split())
BATCH_EVENTS = EVENTS[EVENTS.index('before_batch'):EVENTS.index('after_batch') + 1]

ORDERING = ('order', 'run_before', 'run_after')

# The events as attributes, for tab completion: event.before_fit == 'before_fit'
event = types.SimpleNamespace(**{name: name for name in EVENTS})

class CancelException(Exception):
    """Base of the exceptions that end a part of the loop early, without an error."""

class CancelStepException(CancelException): "Skip the optimizer's step."

class CancelBackwardException(CancelException): "Skip the backward pass."

class CancelBatchException(CancelException): "Skip the rest of the batch."

class CancelTrainException(CancelException): "Skip the rest of the training pass."

class CancelValidException(CancelException): "Skip the rest of the validation pass."

class CancelEpochException(CancelException): "Skip the rest of the epoch."

class CancelFitException(CancelException): "End the training."

def check_event(name):
    """Raise AttributeError, naming the nearest event, unless `name` is an event."""
    if name not in EVENTS:
        near = difflib.get_close_matches(name, EVENTS, 1, 0)
        raise AttributeError(f"{name!r} is not an event; did you mean {near[0]!r}?")

def check_handler(name, value):
    """`check_event` if `value`, an attribute of a callback, looks like a handler."""
    if re.match('(before|after|begin)_', name) and callable(value):
        check_event(name)

def has_state(o):
    """Whether `o` is an object, such as a module, whose `state_dict` can be saved."""
    return hasattr(o, 'state_dict') and not isinstance(o, type)

class Callback:
    """Base class: define methods named after events; they take only `self`.

    `Callback(after_loss=f)` makes one from a function of the callback, and keeps it as
      `functools.partial(f, self)`, so that it can be pickled.
    learn: the Learner, once registered. Attributes that a callback lacks are read from
      there: `self.loss` is `self.learn.loss`; to write, say `self.learn.loss = ...`.
    order: lower runs first, equal ones in the order of adding.
    run_before: classes that this one precedes; run_after: that it follows; one or a
      list, stronger than `order`.
    run: False skips all events up to the end of the fit, which sets it back to True.
    run_train, run_valid: False skips those from before_batch to after_batch there.
    rests: True removes it while predictions are made, as it watches over training.
    Raises: AttributeError for a method that looks like an event but is none.
    Source: fastbook chapter 16.
    """
    order, run_before, run_after, learn = 0, (), (), None
    run = run_train = run_valid = True
    rests = False

    def __init__(self, **handlers):
        for name, f in handlers.items():
            check_event(name)
            setattr(self, name, functools.partial(f, self))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in dir(cls):
            check_handler(name, getattr(cls, name))

    def __call__(self, event_name):
        """Run the method `event_name`, if it exists and the flags allow; its result."""
        training = getattr(self.learn, 'training', True)
        wanted = self.run_train if training else self.run_valid
        wanted = wanted or event_name not in BATCH_EVENTS
        if self.run and wanted and self.defines(event_name):
            return getattr(self, event_name)()

    def defines(self, name):
        """Whether the callback itself, not its learner, has the attribute `name`."""
        return name in self.__dict__ or hasattr(type(self), name)

    def state_dict(self):
        """What a checkpoint keeps: attributes that are numbers, strings, tensors, lists
        or dicts of them; and the states of attributes that have a `state_dict`.
        """
        kept = {k: v for k, v in vars(self).items()
                if k != 'learn' and not isinstance(v, Callback)}
        return {'plain': {k: v for k, v in kept.items() if is_plain(v)},
                'states': {k: v.state_dict() for k, v in kept.items() if has_state(v)}}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave. Raises: ValueError, before any change."""
        states = state.get('states', {})
        for k in states:
            check(has_state(vars(self).get(k)), f"{self!r} has no {k} that could take "
                  "over the saved state: make it in __init__ or before_fit")
        vars(self).update(state.get('plain', {}))
        for k, v in states.items():
            vars(self)[k].load_state_dict(v)

    def __getattr__(self, k):
        """Look `k` up in the learner, but no events and nothing that begins with __."""
        # Python asks here only for what it found nowhere else
        if k in EVENTS or k.startswith('__') or not hasattr(self.learn, k):
            raise AttributeError(f"neither {self!r} nor its learner has {k!r}")
        return getattr(self.learn, k)

    def __setattr__(self, k, v):
        """Set it here; warn if it is the learner's; forget who handles which event."""
        learn = self.learn
        known = learn is not None and (k in vars(learn) or hasattr(type(learn), k))
        if known and not hasattr(Callback, k):
            warnings.warn(f"You are shadowing an attribute ({k}) that exists in the "
                          f"learner. Use `self.learn.{k}` to avoid this", stacklevel=2)
        check_handler(k, v)
        super().__setattr__(k, v)
        if learn is not None and (k in EVENTS or k in ORDERING):
            learn._handlers = {}    # who handles what has changed

    def __repr__(self):
        return type(self).__name__

    # the attribute of the Learner under which it is found
    name = property(lambda self: class2attr(self, 'Callback'))

def sort_callbacks(cbs):
    """`cbs` by `order`, changed where `run_before` and `run_after` demand it.

    Raises: ValueError if they contradict each other.
    """
    def precedes(a, b):
        before, after = tuple(listify(a.run_before)), tuple(listify(b.run_after))
        return a is not b and (isinstance(b, before) or isinstance(a, after))
    waiting, ordered = sorted(cbs, key=lambda cb: cb.order), []
    while waiting:
        free = (b for b in waiting if not any(precedes(a, b) for a in waiting))
        cb = next(free, None)
        what = f"run_before and run_after of {waiting} contradict each other"
        check(cb is not None, what)
        ordered.append(cb)
        waiting.remove(cb)
    return ordered

class TrainEvalCallback(Callback):
    """Puts the model into the right mode and place, and counts progress."""
    order, run_valid = -10, False

    def before_fit(self):
        """Start from 0; move the model, and a loss function with weights, if any."""
        learn = self.learn
        learn.epoch, learn.loss = 0, torch.tensor(0.)
        learn.train_iter, learn.pct_train = 0, 0.
        for o in (learn.model, learn.loss_func):
            if isinstance(o, nn.Module):
                o.to(learn.dls.device)

    def before_train(self):
        """Mode of training, but not for frozen norm layers, unless `train_bn`."""
        self.model.train()
        for m in [] if self.train_bn else self.model.modules():
            frozen = not any(p.requires_grad for p in m.parameters())
            if isinstance(m, NORM_LAYERS) and frozen:
                m.eval()    # or its running mean and variance would move
        self.learn.training = True
        self.learn.pct_train = self.epoch / self.n_epoch

    def before_validate(self):
        self.model.eval()
        self.learn.training = False

    def after_batch(self):
        """Count; pct_train waits for the next epoch if the length is unknown."""
        learn = self.learn
        learn.train_iter += 1
        if learn.n_iter:
            learn.pct_train += 1 / (learn.n_iter * learn.n_epoch)

defaults.callbacks.append(TrainEvalCallback)

# --------------------------------------------------------------------------------------
# 6. Learner: a model, data, a loss and an optimizer, and the loop that joins them
#    Needs: 2 to 5. Tested by: lesson 6.
# --------------------------------------------------------------------------------------

class Learner:
    """Trains `model` on `dls`. The loop is here; what is done in it, callbacks decide.

    dls: a `DataLoaders`.
    model: an nn.Module; what is no attribute of the Learner is looked up there.
    loss_func: called as `loss_func(pred, *yb)`; default: `dls.train_ds.loss_func`.
    opt_func: called as `opt_func(splitter(model), lr=lr)`; `Adam` or the like, a torch
      optimizer class, a `partial` of either, a function that returns an optimizer.
    lr: learning rate if `fit` is given none: a number, at least 0, or a list or slice,
      by group. That of a `partial` wins.
    splitter: function from the model to its parameters, or to a list of groups of them.
    cbs: callbacks, or classes of them, that join those of `defaults.callbacks`.
    metrics: what `mk_metric` takes: functions of `(pred, *yb)`, `Metric`s, objects of
      torchmetrics.
    path, model_dir: files are saved in path/model_dir; default path: that of `dls`.
    wd: weight decay; None leaves it to opt_func.
    wd_bn_bias: whether biases and norm layers decay, too.
    train_bn: whether norm layers train even if they are frozen.
    moms: momentum at the start, peak and end of `fit_one_cycle`.
    default_cbs: False leaves out `defaults.callbacks`; without TrainEvalCallback, `fit`
      trains nothing.
    At first it is in epoch 0 of 1, its loss a tensor of 0, n_iter and opt are None.
    `parallel` is what trains in place of the model in `distrib_ctx`, else None.
    Raises: TypeError for data that are no DataLoaders, ValueError for a loss function
    that is missing or cannot be called, or a bad rate.
    Source: fastai's documentation of Learner.
    """
    def __init__(self, dls, model, loss_func=None, opt_func=Adam, lr=defaults.lr,
                 splitter=trainable_params, cbs=None, metrics=None, path=None,
                 model_dir='models', wd=None, wd_bn_bias=False, train_bn=True,
                 moms=(0.95, 0.85, 0.95), default_cbs=True):
        check(isinstance(dls, DataLoaders), f"dls is a {type(dls).__name__}: write "
              "Learner(DataLoaders(train, valid), model, ...)", TypeError)
        if loss_func is None:
            loss_func = getattr(dls.train_ds, 'loss_func', None)
        check(callable(loss_func), f"loss_func={loss_func!r}: give, say, nn.MSELoss()")
        check_not_negative('lr', lr)
        self.dls, self.model, self.loss_func = dls, model, loss_func
        self.opt_func, self.lr, self.wd, self.moms = opt_func, lr, wd, moms
        self.splitter, self.wd_bn_bias, self.train_bn = splitter, wd_bn_bias, train_bn
        self.metrics = [mk_metric(m) for m in listify(metrics)]
        self.path, self.model_dir = Path(dls.path if path is None else path), model_dir
        self.logger, self.opt, self.training, self.completed = print, None, False, True
        self.epoch, self.n_epoch, self.train_iter, self.pct_train = 0, 1, 0, 0.
        self.iter, self.n_iter, self.parallel, self._cbs = 0, None, None, []
        self.failing = False    # whether an error is on its way out
        self._forget_batch()
        self.loss = torch.tensor(0.)
        self.cbs = [*(defaults.callbacks if default_cbs else []), *listify(cbs)]
        self('after_create')

    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        """Train for `n_epoch` epochs, an int >= 0.

        lr, wd: as in `Optimizer.set_hyper`; default: those of the Learner.
        cbs: callbacks for this fit only.
        reset_opt: begin with a new optimizer.
        start_epoch: leave out the epochs before, 0 to n_epoch; schedules go on as if
          they had run.
        Raises: ValueError for bad values; whatever callbacks, model and loaders raise.
        """
        ok = hasattr(n_epoch, '__index__') and 0 <= start_epoch <= n_epoch
        check(ok, f"n_epoch={n_epoch}, start_epoch={start_epoch}: give whole numbers, "
                  "0 <= start_epoch <= n_epoch")
        wd = self.wd if wd is None else wd
        with self.added_cbs(cbs):
            opt = self.ensure_opt(reset_opt)
            opt.set_hyper('lr', self.lr if lr is None else lr)
            if wd is not None:
                opt.set_hyper('wd', wd)
            self.start_epoch, self.n_epoch = start_epoch, n_epoch
            self.failing = False
            try:
                self._stage('fit', self._all_epochs, CancelFitException)
            finally:
                self._end_fit()

    def _all_epochs(self):
        for self.epoch in range(self.start_epoch, self.n_epoch):
            self._stage('epoch', self._one_epoch, CancelEpochException)

    def _one_epoch(self):
        self.dl = self.dls.train
        self._stage('train', self.all_batches, CancelTrainException)
        if self.dls.valid is not None:
            self.dl = self.dls.valid
            with torch.no_grad():
                self._stage('validate', self.all_batches, CancelValidException)

    def all_batches(self):
        """Train or evaluate on all batches of `self.dl`."""
        self.n_iter = loader_len(self.dl)
        for i, b in enumerate(self.dl):
            self.one_batch(i, b)

    def one_batch(self, i, b):
        """Train (if `self.training`) or evaluate on `b`, batch `i` of this pass."""
        self.iter = i
        self.xb, self.yb = self.dls.split_batch(to_device(b, self.dls.device))
        self._stage('batch', self._one_batch, CancelBatchException)

    def _one_batch(self):
        """Predict; with targets, the loss; in training, learn. Then cut both graphs."""
        model = self.parallel if self.training and self.parallel else self.model
        try:
            self.pred = self.in_precision(model, *self.xb)
            self._fire('after_pred')
            if self.yb:
                self.loss = self.in_precision(self.loss_func, self.pred, *self.yb)
                self._fire('after_loss')
            if self.yb and self.training:
                self._learn()
        finally:
            if torch.is_grad_enabled():    # the graph must not outlive the batch
                graph = (self.pred, self.loss)
                self.pred, self.loss = map_tensors(without_graph, graph)

    def _learn(self):
        opt, loss = self.opt or self.ensure_opt(), self.loss
        self._stage('backward', self._backward, CancelBackwardException)
        self.loss = loss    # before_backward may scale it, for the gradients alone
        self._stage('step', opt.step, CancelStepException)
        opt.zero_grad()

    def _backward(self):
        self.loss.backward()

    def in_precision(self, f, *args):
        """`f(*args)`, in the precision that `MixedPrecision` sets, if it is present."""
        if 'mixed_precision' not in self.__dict__:
            return f(*args)
        with self.mixed_precision.autocast():
            return f(*args)

    def _stage(self, name, body, cancel):
        """Fire before_<name>, run `body`, fire after_<name>; `cancel` ends it early.

        A `cancel` that is raised in after_<name> comes too late, and goes on.
        In after_<name>, `self.completed` says whether the part ran to its end, and
        `self.failing` whether an error passes through. Of two errors the first goes on,
        with a note of the second; a Cancel gives way to whatever comes later.
        """
        try:
            try:
                self._fire(f'before_{name}')
                body()
                self.completed = True
            except cancel:
                self.completed = False
                self._fire(f'after_cancel_{name}')
        except BaseException as first:
            self.completed = False
            self.failing = not isinstance(first, CancelException)
            try:
                self._fire(f'after_{name}')
            except BaseException as second:
                # nothing hides an error; a Cancel gives way to whatever comes later
                if isinstance(first, CancelException):
                    raise
                add_note(first, f"on the way out, after_{name} raised {second!r}")
            raise
        self._fire(f'after_{name}')

    def _fire(self, name):
        """Call `name` on the callbacks that define it; note on errors who raised."""
        if not self._handlers:
            ordered = sort_callbacks(self.cbs)
            self._handlers = {event: [cb for cb in ordered if cb.defines(event)]
                              for event in EVENTS}
        for cb in self._handlers[name]:
            try:
                if cb.learn is self:    # it may have been removed by the one before
                    cb(name)
            except BaseException as e:
                add_note(e, f"raised by the callback {cb!r} in {name}")
                raise

    def _end_fit(self):
        """Forget batch and gradients; switch callbacks on again that were off."""
        self._forget_batch()
        self.training = self.failing = False
        if self.opt:
            self.opt.zero_grad()    # of a batch that broke off: not for the next fit
        for cb in self.cbs:
            cb.run = True

    def _forget_batch(self):
        self.xb = self.yb = (None,)
        self.dl = self.pred = self.loss = None

    def __call__(self, event_name):
        """Call an event, or a list of them, on the callbacks, in order."""
        for name in listify(event_name):
            check_event(name)
            self._fire(name)

    def ordered_cbs(self, event):
        """The callbacks that define `event`, in the order in which they are called."""
        return [cb for cb in sort_callbacks(self.cbs) if cb.defines(event)]

    @property
    def cbs(self):
        """The callbacks, in the order of adding. Each is also `learn.<name>`."""
        return self._cbs

    @cbs.setter
    def cbs(self, cbs):
        """Register these callbacks, and no others; see `add_cbs`."""
        cbs = [cb() if isinstance(cb, type) else cb for cb in listify(cbs)]
        for cb in cbs:
            check(isinstance(cb, Callback), f"{cb!r} is no callback", TypeError)
        taken = {*dir(type(self)), *vars(self)} - {cb.name for cb in self._cbs}
        kinds = {}
        for i, cb in enumerate(cbs):
            name = cb.name
            check(cb not in cbs[:i], f"{cb!r} is there already: add another object")
            free = name not in taken and kinds.setdefault(name, type(cb)) is type(cb)
            check(free, f"{cb!r}: the name {name!r} is taken; rename its class")
        for cb in self._cbs:
            cb.learn = None
            vars(self).pop(cb.name, None)
        for cb in cbs:
            cb.learn, vars(self)[cb.name] = self, cb
        self._cbs = cbs
        self._handlers = {}

    def add_cbs(self, cbs):
        """Register a callback (a class is instantiated) or a list; returns the learner.

        Several of one class may share a name; taken is what the Learner has, or what
        belongs to another class.
        Raises: ValueError if a name is taken or a callback registered, TypeError for
        what is no callback; then adds none.
        """
        self.cbs = self._cbs + listify(cbs)
        return self

    def remove_cbs(self, cbs):
        """Remove callbacks, or all of a class, if present; returns the learner."""
        cbs = listify(cbs)
        kinds = tuple(o for o in cbs if isinstance(o, type))
        self.cbs = [cb for cb in self._cbs
                    if cb not in cbs and not isinstance(cb, kinds)]
        return self

    add_cb, remove_cb = add_cbs, remove_cbs

    @contextmanager
    def added_cbs(self, cbs):
        """Context with `cbs` registered as well; yields the learner."""
        before = self._cbs
        added = [cb for cb in self.add_cbs(cbs).cbs if cb not in before]
        try:
            yield self
        finally:
            self.remove_cbs(added)

    @contextmanager
    def removed_cbs(self, cbs):
        """Context without `cbs` (callbacks or classes); yields the learner."""
        before = self._cbs
        rest = self.remove_cbs(cbs).cbs
        try:
            yield self
        finally:
            # to their old places, since equal orders run in the order of adding
            back = [cb for cb in before if cb not in rest or cb in self._cbs]
            self.cbs = back + [cb for cb in self._cbs if cb not in before]

    def __getattr__(self, k):
        # subtle: copy and pickle ask before __init__ ran, when there is no model either
        model = self.__dict__.get('model')
        if k.startswith('__') or not hasattr(model, k):
            raise AttributeError(f"neither the Learner nor its model has {k!r}")
        return getattr(model, k)

    data = property(lambda self: self.dls, doc="Another name for `dls`.")
    x = property(lambda self: detuplify(self.xb), doc="`xb`, without a tuple of one.")
    y = property(lambda self: detuplify(self.yb), doc="`yb`, without a tuple of one.")

    def gather_args(self):
        """Arguments of Learner and callbacks: `{'Learner.__init__.lr': 0.001, ...}`."""
        return {f'{type(o).__name__}.__init__.{k}': getattr(o, k)
                for o in (self, *self.cbs)
                for k in inspect.signature(type(o)).parameters if k in vars(o)}

    init_args = property(gather_args)

    def create_opt(self):
        """Make `self.opt` for the model, on its device, with splitter and opt_func.

        Rates by group are set after it was called with `defaults.lr`.
        """
        self.model.to(self.dls.device)    # first, so that its state lands there, too
        make = self.opt_func
        self.lr = getattr(make, 'keywords', {}).get('lr', self.lr)
        f = getattr(make, 'func', make)
        if isinstance(f, type) and issubclass(f, torch.optim.Optimizer):
            make = functools.partial(OptimWrapper, opt=make)
        lr = self.lr if isinstance(self.lr, (int, float)) else defaults.lr
        opt = make(self.splitter(self.model), lr=lr)
        self.opt = OptimWrapper(opt) if isinstance(opt, torch.optim.Optimizer) else opt
        self.opt.made_for = list(self.model.parameters())
        self.opt.set_hyper('lr', self.lr)    # it may be a list or slice, by group
        for p in [] if self.wd_bn_bias else norm_bias_params(self.model):
            self.opt.state[p]['do_wd'] = False
        for p in norm_bias_params(self.model, with_bias=False) if self.train_bn else []:
            self.opt.state[p]['force_train'] = True

    def ensure_opt(self, reset=False):
        """The optimizer; a new one if `reset`, or if there is none for this model.

        One that you set yourself stays; of torch's, it is wrapped.
        """
        if isinstance(self.opt, torch.optim.Optimizer):
            self.opt = OptimWrapper(self.opt)
        now = list(self.model.parameters())
        then = getattr(self.opt, 'made_for', now)    # a user's own optimizer stays
        changed = [id(p) for p in now] != [id(p) for p in then]
        if reset or changed or self.opt is None:
            self.create_opt()
        return self.opt

    def freeze_to(self, n):
        """`Optimizer.freeze_to`; and the optimizer forgets what it has averaged."""
        self.ensure_opt().freeze_to(n)
        self.opt.clear_state()

    def freeze(self):
        """Train only the last parameter group. Raises: ValueError if there is one."""
        self.ensure_opt().freeze()
        self.opt.clear_state()

    def unfreeze(self):
        """Train all parameter groups."""
        self.freeze_to(0)

    def gather(self, o):
        """What each process has for `o`, a list: one item, but in `distrib_ctx`."""
        distributed = vars(self).get('distributed')
        # after an error, the other processes are elsewhere: do not wait for them
        return distributed.gather(o) if distributed and not self.failing else [o]

    def distrib_ctx(self, **kwargs):
        """Context that trains in several processes; see the function below."""
        return distrib_ctx(self, **kwargs)

    def no_logging(self):
        """Context in which nothing is printed."""
        return contextmanager(replacing_yield)(self, 'logger', lambda *args: None)

    def no_bar(self):
        """Context without bar and table: rows go to `logger` as lists."""
        return self.removed_cbs([cb for cb in self.cbs if cb.name == 'progress'])

    no_mbar = no_bar

    def loss_not_reduced(self):
        """Context in which the loss keeps one value per sample (`reduction='none'`)."""
        replacing = contextmanager(replacing_yield)
        if hasattr(self.loss_func, 'reduction'):
            return replacing(self.loss_func, 'reduction', 'none')
        unreduced = functools.partial(self.loss_func, reduction='none')
        return replacing(self, 'loss_func', unreduced)

    def to_detach(self, b, cpu=True, gather=True):
        """`b` without its graph; see `to_detach_from_dl`."""
        return to_detach_from_dl(self, b, cpu, gather)

    def show_training_loop(self):
        """Print the events of a fit, indented, with the callbacks of each."""
        batches = ['Start Batch Loop', *BATCH_EVENTS, 'End Batch Loop']
        fit = ['Start Fit', 'before_fit', 'Start Epoch Loop', 'before_epoch',
               'Start Train', 'before_train', *batches, 'End Train',
               'after_cancel_train', 'after_train', 'Start Valid', 'before_validate',
               batches[0], '**CBs same as train batch**', batches[-1], 'End Valid',
               'after_cancel_validate', 'after_validate', 'End Epoch Loop',
               'after_cancel_epoch', 'after_epoch', 'End Fit', 'after_cancel_fit',
               'after_fit']
        indent = 0
        for line in fit:
            indent -= 2 * line.startswith('End')
            is_title = line.startswith(('Start', 'End'))
            shown = line if is_title else f' - {line:15}: {self.ordered_cbs(line)}'
            print(' ' * indent + shown)
            indent += 2 * line.startswith('Start')

    def fit_one_cycle(self, *args, **kwargs):
        """fit_one_cycle(n_epoch, lr_max=None, div=25., div_final=1e5, pct_start=0.25,
        wd=None, moms=None, cbs=None, reset_opt=False, start_epoch=0): see the function
        below.
        """
        fit_one_cycle(self, *args, **kwargs)

    def fine_tune(self, *args, **kwargs):
        """fine_tune(epochs, base_lr=2e-3, freeze_epochs=1, lr_mult=100, pct_start=0.3,
        div=5.0, **kwargs): see the function below.
        """
        fine_tune(self, *args, **kwargs)

    def lr_find(self, *args, **kwargs):
        """lr_find(start_lr=1e-7, end_lr=10, num_it=100, stop_div=True, show_plot=True,
        suggest_funcs=(minimum, steep)): see the function below.
        """
        return lr_find(self, *args, **kwargs)

    def validation_context(self, cbs=None, inner=False):
        """Context for predictions that disturb nothing; see the function below."""
        return validation_context(self, cbs)

    def validate(self, ds_idx=1, dl=None, cbs=None):
        """`[loss, *metrics]` of loader `ds_idx`, or of `dl`; see the function below."""
        return validate(self, ds_idx, dl, cbs)

    def get_preds(self, *args, **kwargs):
        """get_preds(ds_idx=1, dl=None, with_input=False, with_decoded=False,
        with_loss=False, act=None, inner=False, reorder=True, cbs=None, save_preds=None,
        save_targs=None, concat_dim=0): see the function below.
        """
        return get_preds(self, *args, **kwargs)

    def predict(self, item, with_input=False):
        """Prediction for one item without batch dimension; see the function below."""
        return predict(self, item, with_input)

    def show_results(self, ds_idx=1, dl=None, max_n=9, shuffle=True, ax=None):
        """Draw samples with target and prediction; see the function below."""
        return show_results(self, ds_idx, dl, max_n, shuffle, ax)

    def tta(self, *args, **kwargs):
        """tta(ds_idx=1, dl=None, n=4, item_tfms=None, batch_tfms=None, beta=0.25,
        use_max=False): see the function below.
        """
        return tta(self, *args, **kwargs)

    def export(self, fname='export.pkl', pickle_protocol=2):
        """Write the learner without data and optimizer; see the function below."""
        return export(self, fname, pickle_protocol)

    def to_fp16(self):
        """Train in float16 where it can be done (CUDA); see `MixedPrecision`."""
        return set_precision(self, 'fp16')

    def to_bf16(self):
        """Train in bfloat16; see `MixedPrecision`."""
        return set_precision(self, 'bf16')

    def to_fp32(self):
        """Train in full precision again."""
        return set_precision(self, None)

    def model_file(self, file):
        """path/model_dir/file.pth; an absolute path, or an open file, as it is."""
        if not isinstance(file, (str, Path)) or Path(file).is_absolute():
            return file
        return self.path / self.model_dir / f"{str(file).removesuffix('.pth')}.pth"

    def save(self, file, with_opt=True, pickle_protocol=2):
        """Save to `model_file(file)`, which is returned; see `save_model`."""
        file = self.model_file(file)
        return save_model(file, self.model, self.opt, with_opt, pickle_protocol)

    def load(self, file, with_opt=None, device=None, strict=True):
        """Load from `model_file(file)`; returns the learner; see `load_model`.

        Of several processes, all wait until the first has saved.
        """
        opt = None if with_opt is False else self.ensure_opt()
        self.gather(None)    # wait for the process that may be writing it
        load_model(self.model_file(file), self.model, opt, with_opt, device, strict)
        return self

def loader_len(dl):
    """Number of batches of a loader; None if it has no length."""
    try:
        return len(dl)
    except (TypeError, NotImplementedError):
        return None

def before_batch_cb(f):
    """Decorator: a callback that replaces each batch by `f(self, xb, yb) -> xb, yb`.

    xb, yb: the tuples of the batch, bare if they have one element.
    """
    def before_batch(self):
        xb, yb = f(self, self.x, self.y)
        self.learn.xb = xb if isinstance(xb, tuple) else (xb,)
        self.learn.yb = yb if isinstance(yb, tuple) else (yb,)
    return Callback(before_batch=before_batch)

# --------------------------------------------------------------------------------------
# 7. Metrics: numbers about a whole pass, exact also if the last batch is smaller
#    Needs: 2. Tested by: lesson 7.
# --------------------------------------------------------------------------------------

class Metric:
    """Blueprint: `reset` before a pass, `accumulate` after every batch, then `value`.

    value: a property, the result over all batches. name: title of its column; here the
    class name in snake case without 'Metric'.
    """
    value = None
    name = property(lambda self: class2attr(self, 'Metric'))

    def reset(self):
        """Forget all batches."""

    def accumulate(self, learn):
        """Take in the batch: `learn.xb`, `learn.yb`, `learn.pred`, `learn.loss`."""

    def gather(self, learn):
        """At the end of a pass: take in what other processes have; `Learner.gather`."""

class AvgMetric(Metric):
    """Mean of `func(pred, *yb)` over all samples, that is, weighted by batch size.

    func returns a number, or a tensor or array of one. Its name is that of the metric.
    total, count: the sums so far; value: the mean, None if there was no sample.
    """
    def __init__(self, func):
        self.func = func
        self.reset()

    def reset(self):
        """Forget all batches."""
        self.total, self.count = 0., 0

    def accumulate(self, learn):
        """Add the batch, weighted by `find_bs(learn.yb)`, without its graph.

        The sum stays on the device, so that nothing waits for it. Half precision is
        summed in float32.
        """
        value, bs = self.batch_value(learn), find_bs(learn.yb)
        if isinstance(value, torch.Tensor):
            if not self.count:    # a sum of float16 would soon overflow
                dtype = torch.promote_types(value.dtype, torch.float32)
                self.total = torch.zeros_like(value, dtype=dtype)
            self.total.add_(without_graph(value), alpha=bs)
        else:
            self.total += value * bs
        self.count += bs

    def gather(self, learn):
        """Add up the sums of all processes."""
        sums = learn.gather((plain_number(self.total), self.count))
        if len(sums) > 1:
            self.total, self.count = map(sum, zip(*sums))

    def batch_value(self, learn):
        """The value for one batch."""
        return self.func(learn.pred, *learn.yb)

    name = property(lambda self: func_name(self.func))
    value = property(lambda self: self.total / self.count if self.count else None)

class AvgLoss(AvgMetric):
    """Mean of `learn.loss` over all samples."""
    name = 'loss'

    def __init__(self):
        super().__init__(None)

    def batch_value(self, learn):
        """The loss of one batch."""
        loss = learn.loss
        return loss.mean() if loss.dim() else loss    # a mean costs more than the test

class AvgSmoothLoss(AvgLoss):
    """Moving average of `learn.loss`, debiased.

    beta: weight of the past, 0 to below 1. Raises: ValueError.
    """
    name = 'smooth_loss'

    def __init__(self, beta=0.98):
        check(0 <= beta < 1, f"beta={beta}: give a share of the past, 0 to below 1")
        self.beta = beta
        super().__init__()

    def accumulate(self, learn):
        """Add the loss of the batch: `total` is the average itself."""
        loss = without_graph(self.batch_value(learn)).float()
        self.count += 1
        # subtle: debiased at once. 1 - beta is the share of a new loss in a sum that
        # began at 0; 1 - beta**count is the share of all losses in it so far
        share = (1 - self.beta) / (1 - self.beta ** self.count)
        is_first = self.count == 1
        self.total = loss.clone() if is_first else torch.lerp(self.total, loss, share)

    def gather(self, learn):
        """Nothing: in a training pass, `loss` is the mean over all processes."""

    @property
    def value(self):
        """The average, a 0-d tensor; None if there was no batch."""
        return self.total if self.count else None

class ValueMetric(Metric):
    """A number from elsewhere: what `func()` returns at the end of a pass."""
    name = None

    def __init__(self, func, metric_name=None):
        self.func, self.name = func, metric_name or func_name(func)

    value = property(lambda self: self.func())

class ObjectMetric(Metric):
    """An object with update(pred, *yb), compute() and reset(), as in torchmetrics.

    In several processes, it is its `compute` that joins them, as torchmetrics does.
    """
    def __init__(self, metric):
        self.metric, self.reset = metric, metric.reset

    def accumulate(self, learn):
        """Update the object with what has no graph, on the device of the prediction."""
        pred = map_tensors(torch.detach, learn.pred)
        device = getattr(first_item(pred), 'device', None)
        if hasattr(self.metric, 'to') and device:
            self.metric.to(device)
        self.metric.update(pred, *learn.yb)

    value = property(lambda self: self.metric.compute())
    name = property(lambda self: class2attr(self.metric, 'Metric'))

def mk_metric(m):
    """`m` as a `Metric`: a class is called, an object wrapped, a function averaged.

    Raises: TypeError for anything else.
    """
    m = m() if isinstance(m, type) else m
    if isinstance(m, Metric):
        return m
    if all(hasattr(m, k) for k in ('update', 'compute', 'reset')):
        return ObjectMetric(m)
    check(callable(m), f"metric {m!r}: give a function of (pred, target)", TypeError)
    return AvgMetric(m)

def accuracy(pred, target, axis=-1):
    """Share of the samples whose largest score along `axis` is at the target class.

    pred: (B, C) scores; target: (B,) or (B, 1) int; further dimensions alike.
    Returns: 0-d, 0 to 1. Raises: RuntimeError, by torch, if their numbers differ.
    """
    found = pred.argmax(axis)
    if found.shape != target.shape:    # or each would be compared with every other
        target = target.reshape(found.shape)
    return (found == target).float().mean()

def error_rate(pred, target, axis=-1):
    """1 - accuracy"""
    return 1 - accuracy(pred, target, axis)

# --------------------------------------------------------------------------------------
# 8. Recorder: what happened, kept, printed and drawn
#    Needs: 2, 5 to 7. Tested by: lesson 8.
# --------------------------------------------------------------------------------------

class Recorder(Callback):
    """Keeps losses, learning rates and metrics; gives the logger a row for every epoch.

    add_time: end the row with the time, 'mm:ss'.
    train_metrics, valid_metrics: whether metrics are computed in that pass, beside the
      loss, which always is.
    beta: weight of the past in the smoothed training loss (0 to below 1), which is
      `learn.smooth_loss` and, at an epoch's end, the column train_loss.
    losses, lrs: smoothed loss (0-d) and rate of the last group, by training batch.
    iters: training batches up to each epoch's end.
    metric_names: titles of `log`, the newest row; with train_metrics, those of metrics
      begin with train_ or valid_.
    values: all rows, without epoch and time, `learn.final_record` being the last; None
      is where a cancelled pass has left no value.
    """
    order, rests, train_mets, valid_mets, done = 50, True, (), (), None

    def __init__(self, add_time=True, train_metrics=False, valid_metrics=True,
                 beta=0.98):
        self.add_time, self.train_metrics = add_time, train_metrics
        self.valid_metrics, self.beta = valid_metrics, beta

    def before_fit(self):
        self.lrs, self.iters, self.losses, self.values = [], [], [], []
        metrics = [mk_metric(m) for m in listify(self.learn.metrics)]
        self.smooth = AvgSmoothLoss(self.beta)
        self.train_mets = [self.smooth, *(metrics if self.train_metrics else [])]
        self.valid_mets = [AvgLoss(), *(metrics if self.valid_metrics else [])]
        if self.dls.valid is None:
            self.valid_mets = []
        prefix = 'valid_' if self.train_metrics else ''
        names = ['epoch', 'train_loss']
        names += [f'train_{m.name}' for m in self.train_mets[1:]]
        names += ['valid_loss'] if self.valid_mets else []
        names += [prefix + m.name for m in self.valid_mets[1:]]
        self.metric_names = names + (['time'] if self.add_time else [])
        self.learn.smooth_loss, self.done, self.hps = None, {}, {}

    def before_epoch(self):
        self.start = time.perf_counter()

    def before_train(self):
        """Reset the metrics; the smoothed loss goes on through the epochs."""
        for m in self.train_mets[1:]:
            m.reset()

    def before_validate(self):
        for m in self.valid_mets:
            m.reset()

    def after_batch(self):
        """Measure; not a cancelled batch, none without targets, none outside a fit."""
        learn = self.learn
        if not learn.completed or not learn.yb or not self.train_mets:
            return
        for m in self.train_mets if learn.training else self.valid_mets:
            m.accumulate(learn)
        if learn.training:
            learn.smooth_loss = self.smooth.value
            self.losses.append(learn.smooth_loss)
            self.lrs.append(learn.opt.param_groups[-1]['lr'])

    def after_train(self):
        self._keep('train', self.train_mets)

    def after_validate(self):
        self._keep('valid', self.valid_mets)

    def _keep(self, phase, metrics):
        if self.completed and metrics:
            for m in metrics:
                m.gather(self.learn)
            values = [plain_number(m.value) for m in metrics]
            self.done[phase] = self.learn.gather(values)[0]    # all decide by the same

    def after_epoch(self):
        """Make the row of what `done` holds, if it holds anything; keep and show it.

        It goes to `progress.write_row` if the logger is `print` and there is a table,
        else to the logger.
        """
        done, self.done = self.done, {}
        if not done:
            return      # an epoch that was skipped
        self.iters.append(len(self.losses))
        row = [*done.get('train', [None] * len(self.train_mets)),
               *done.get('valid', [None] * len(self.valid_mets))]
        self.learn.final_record = row
        self.values.append(row)
        spent = format_time(time.perf_counter() - self.start)
        self.log = [self.epoch, *row, *([spent] if self.add_time else [])]
        in_table = self.logger is print and 'progress' in vars(self.learn)
        (self.progress.write_row if in_table else self.logger)(self.log)

    def state_dict(self):
        """The history so far; the losses as one tensor."""
        losses = torch.stack(self.losses) if self.losses else torch.empty(0)
        return {'lrs': self.lrs, 'iters': self.iters, 'values': self.values,
                'losses': losses, 'smooth': [self.smooth.total, self.smooth.count],
                'hps': self.hps}

    def load_state_dict(self, state):
        """Go on with the history that `state_dict` gave."""
        self.lrs, self.iters, self.values, self.hps = (
            state[k] for k in ('lrs', 'iters', 'values', 'hps'))
        self.losses = list(state['losses'])
        self.smooth.total, self.smooth.count = state['smooth']
        self.learn.smooth_loss = self.smooth.value
        self.learn.final_record = self.values[-1] if self.values else None

    def plot_loss(self, skip_start=5, with_valid=True, log=False, show_epochs=False,
                  ax=None):
        """Draw the smoothed training loss from batch `skip_start` on; returns the axes.

        with_valid: and the validation loss of each epoch. log: logarithmic axis.
        show_epochs: mark the ends of epochs. ax: matplotlib axes to draw into.
        """
        ax, losses = ax or new_axes()[0, 0], [float(loss) for loss in self.losses]
        ax.plot(range(skip_start, len(losses)), losses[skip_start:], label='train')
        if with_valid and self.valid_mets:
            valid = [row[len(self.train_mets)] for row in self.values]
            ax.plot(self.iters, valid, '.-', label='valid')
        for i in self.iters if show_epochs else []:
            ax.axvline(i, color='lightgray', zorder=0)
        ax.set(xlabel='batch', ylabel='loss', yscale='log' if log else 'linear')
        ax.legend()
        return ax

    def plot_sched(self, keys=None, figsize=None, ax=None):
        """Draw the hypers that a schedule has set, by batch; returns the array of axes.

        keys: their names; default: all. figsize: of a new figure, in inches.
        ax: an array of axes to draw into, one per key; a new one is (1, n).
        Raises: ValueError if no hyper was scheduled.
        """
        keys = list(self.hps) if keys is None else listify(keys)
        check(keys, "no hyper was scheduled in the last fit: try fit_one_cycle")
        axs = new_axes(len(keys), figsize) if ax is None else ax
        for ax, key in zip(axs.flat, keys):
            ax.plot(self.hps[key])
            ax.set(xlabel='batch', ylabel=key)
        return axs

    def plot_lr_find(self, skip_end=5, suggestions=None, ax=None):
        """Draw the loss by learning rate, as `lr_find` left it; returns the axes.

        skip_end: leave out so many batches, when the loss explodes. suggestions: what
        `lr_find` returned, to mark as points of the curve.
        """
        ax, n = ax or new_axes()[0, 0], max(1, len(self.losses) - skip_end)
        ax.plot(self.lrs[:n], [float(loss) for loss in self.losses[:n]])
        for name, lr in suggestions._asdict().items() if suggestions else ():
            loss = self.losses[min(range(n), key=lambda i: abs(self.lrs[i] - lr))]
            ax.plot(lr, float(loss), 'o', label=f'{name}: {lr:.1e}')
            ax.legend()
        ax.set(xlabel='learning rate', ylabel='loss', xscale='log')
        return ax

def new_axes(n=1, figsize=None):
    """Array (1, n) of axes, side by side in a new matplotlib figure."""
    import matplotlib.pyplot as plt
    figsize = figsize or (6.4 * n, 4.8)
    return plt.subplots(1, n, squeeze=False, figsize=figsize, layout='constrained')[1]

def format_time(seconds):
    """'mm:ss', or 'h:mm:ss' from an hour on, rounded."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f'{h}:{m:02}:{s:02}' if h else f'{m:02}:{s:02}'

class ProgressCallback(Callback):
    """Prints the rows of the Recorder as a table, and a bar that moves meanwhile.

    The bar needs a terminal or a notebook. It is drawn at most 10 times a second, since
    reading the loss waits for the device. If `learn.logger` is not `print`, or there is
    no Recorder, this does nothing: somebody else shows the rows.
    """
    order, rests, has_bar, drawn = 55, True, False, ''

    def before_fit(self):
        self.shows = self.logger is print and 'recorder' in vars(self.learn)
        is_live = getattr(sys.stdout, 'isatty', bool)() or 'ipykernel' in sys.modules
        self.has_bar = self.shows and is_live
        self.drawn = ''
        if self.shows:
            self.write_row(self.recorder.metric_names)

    def before_train(self):
        self.start = self.last_time = time.perf_counter()

    before_validate = before_train

    def after_batch(self):
        if self.has_bar and time.perf_counter() - self.last_time > 0.1:
            self.last_time = time.perf_counter()
            self.draw(self.bar_text(self.last_time - self.start))

    def after_fit(self):
        self.draw('')

    def state_dict(self):
        """Nothing: where it prints, and what, is not for a checkpoint."""
        return {}

    def bar_text(self, seconds):
        """'epoch 1/3 train |####      | 4/10, 00:02 left, 3 batches/s, loss 0.1234'.

        seconds: since the pass began. What is unknown is left out: without length and
        loss it is 'epoch 1/3 train, 3 batches/s'.
        """
        done, total, loss = self.iter + 1, self.n_iter, self.learn.smooth_loss
        phase = 'train' if self.training else 'valid'
        text = f'epoch {self.epoch + 1}/{self.n_epoch} {phase}'
        if total:
            left = format_time(seconds / done * (total - done))
            text += f" |{'#' * (10 * done // total):10}| {done}/{total}, {left} left"
        text += f', {done / seconds:.0f} batches/s'
        return text if loss is None else f'{text}, loss {float(loss):.4f}'

    def draw(self, text):
        """Put `text`, cut to the terminal's width, over the last one; '' wipes it."""
        text = text[:shutil.get_terminal_size().columns - 1]
        if text or self.drawn:
            padded = text.ljust(len(self.drawn))
            print(f'\r{padded}', end='' if text else '\r', flush=True)
        self.drawn = text

    def write_row(self, row):
        """Wipe the bar, print the cells, 10 wide or more (epoch: 5), 2 spaces apart."""
        self.draw('')
        widths = [max(len(name), 5 if name == 'epoch' else 10)
                  for name in self.recorder.metric_names]
        print('  '.join(format_cell(v, w) for v, w in zip(row, widths)), flush=True)

def format_cell(v, width):
    """A cell of the table, in one line, to the right.

    Floats with six decimals, or as 1.23e+04 if these do not fit; others are cut; None
    is empty.
    """
    if isinstance(v, float):
        text = f'{v:.6f}' if len(f'{v:.6f}') <= width else f'{v:.2e}'
    else:
        text = '' if v is None else ' '.join(str(v).split())[:width]
    return text.rjust(width)

defaults.callbacks += [Recorder, ProgressCallback]

# --------------------------------------------------------------------------------------
# 9. Schedules: hyper-parameters as functions of the progress of training
#    Needs: 2 to 6. Tested by: lesson 9.
# --------------------------------------------------------------------------------------

def annealer(f):
    """Decorator: `f(start, end, pos)` becomes `g(start, end)`, a function of `pos`.

    start, end: numbers, or lists with one number per parameter group. pos: 0 to 1.
    """
    return lambda start, end: functools.partial(anneal, f, start, end)

def anneal(f, start, end, pos):
    """`f(start, end, pos)`, or the list of it for lists of starts and ends."""
    if isinstance(start, (list, tuple)):
        return [f(s, e, pos) for s, e in zip(start, end)]
    return f(start, end, pos)

def sched_lin(start, end, pos):
    """On a straight line."""
    return start + pos * (end - start)

def sched_no(start, end, pos):
    """`start` all the time."""
    return start

def sched_exp(start, end, pos):
    """By equal factors; both ends above 0."""
    return start * (end / start) ** pos

def sched_poly(power, start, end, pos):
    """Along `pos**power`."""
    return start + (end - start) * pos**power

def sched_cos(start, end, pos):
    """Along half a cosine: slow, fast, slow."""
    return start + (1 - math.cos(math.pi * pos)) * (end - start) / 2

SchedLin, SchedNo = annealer(sched_lin), annealer(sched_no)
SchedExp, SchedCos = annealer(sched_exp), annealer(sched_cos)

def SchedPoly(start, end, power):
    """From `start` to `end` along `pos**power`."""
    return annealer(functools.partial(sched_poly, power))(start, end)

def combine_scheds(pcts, scheds):
    """Play schedules one after another; `pcts` are their shares and sum to 1.

    Each sees `pos` from 0 to 1 of its own part. At a border the next one begins; a part
    without a share is at its end.
    Raises: ValueError for bad shares.
    """
    ok = all(pct >= 0 for pct in pcts) and abs(sum(pcts) - 1) < 1e-6
    ok = ok and len(pcts) == len(scheds)
    check(ok, f"pcts={pcts}, {len(scheds)} schedules: give shares >= 0 that sum to 1")
    starts = [sum(pcts[:i]) for i in range(len(pcts))]

    def at(pos):
        i = max(i for i, start in enumerate(starts) if pos >= start)
        return scheds[i](min(1., (pos - starts[i]) / pcts[i]) if pcts[i] else 1.)
    return at

def combined_cos(pct, start, middle, end):
    """By cosines from `start` to `middle` for the share `pct`, then on to `end`."""
    scheds = [SchedCos(start, middle), SchedCos(middle, end)]
    return combine_scheds([pct, 1 - pct], scheds)

class ParamScheduler(Callback):
    """Sets hypers before each training batch: `{name: function of pct_train}`.

    They are set at the start of the fit, too, so that a new name is known by then.
    hps: what was set, a list per name (of the last group); after the fit `recorder.hps`
      has them, too.
    Raises: ValueError, which names `__len__`, if the training loader has no length.
    """
    order, run_valid = 60, False

    def __init__(self, scheds):
        self.scheds = scheds

    def before_fit(self):
        known = loader_len(self.dls.train) is not None
        check(known, "a schedule needs the length of an epoch: give the loader __len__")
        for name, sched in self.scheds.items():
            self.opt.set_hyper(name, sched(0.))    # now, as it may be a new name
        self.hps = {name: [] for name in self.scheds}

    def before_batch(self):
        for name, sched in self.scheds.items():
            value = sched(self.pct_train)
            self.opt.set_hyper(name, value)
            self.hps[name].append(listify(value)[-1])

    def after_fit(self):
        if 'recorder' in vars(self.learn):
            self.recorder.hps.update(self.hps)

def fit_one_cycle(learn, n_epoch, lr_max=None, div=25., div_final=1e5, pct_start=0.25,
                  wd=None, moms=None, cbs=None, reset_opt=False, start_epoch=0):
    """Fit while the learning rate rises, then falls, and momentum does the opposite.

    lr_max: highest rate, by group as in `Optimizer.set_hyper`; default: `learn.lr`.
    div, div_final: it starts at lr_max / div and ends at lr_max / div_final.
    pct_start: share of the fit (0 to 1) up to the peak.
    moms: momentum at the start, peak and end; default: `learn.moms`. An optimizer with
      `mom=0` is left without.
    Others: see `Learner.fit`. Source: Smith and Topin, 'Super-Convergence', 2018.
    """
    opt = learn.ensure_opt(reset_opt)
    peak = opt.per_group('lr', learn.lr if lr_max is None else lr_max)
    start, end = [lr / div for lr in peak], [lr / div_final for lr in peak]
    scheds = {'lr': combined_cos(pct_start, start, peak, end)}
    if any(hyper.get('mom') != 0 for hyper in opt.hypers):
        scheds['mom'] = combined_cos(pct_start, *(moms or learn.moms))
    cbs = [ParamScheduler(scheds), *listify(cbs)]
    learn.fit(n_epoch, peak, wd, cbs, start_epoch=start_epoch)

def fine_tune(learn, epochs, base_lr=2e-3, freeze_epochs=1, lr_mult=100, pct_start=0.3,
              div=5.0, **kwargs):
    """Train the last group for `freeze_epochs` epochs, then all groups for `epochs`.

    base_lr: highest rate of the first part; in the second, half of it for the last
      group, and a `lr_mult`-th of that for the first one.
    pct_start, div: of the second part, see `fit_one_cycle`; the first has its peak at
      0.99. kwargs: of both; reset_opt: before the first.
    Source: fastai's documentation of transfer learning.
    """
    learn.ensure_opt(kwargs.pop('reset_opt', False))
    learn.freeze()
    learn.fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=0.99, **kwargs)
    base_lr /= 2
    learn.unfreeze()
    lrs = slice(base_lr / lr_mult, base_lr)
    learn.fit_one_cycle(epochs, lrs, pct_start=pct_start, div=div, **kwargs)

class LRFinder(ParamScheduler):
    """Raises the learning rate by equal factors for `num_it` batches, then stops.

    stop_div: also end it when the smoothed loss exceeds 4 times its lowest value, or is
    no number any more. There is no validation.
    Source: Smith, 'Cyclical Learning Rates for Training Neural Networks', 2017.
    """
    def __init__(self, start_lr=1e-7, end_lr=10, num_it=100, stop_div=True):
        self.num_it, self.stop_div, self.best_loss = num_it, stop_div, math.inf
        self.scheds = {'lr': lambda pct_train: sched_exp(
            start_lr, end_lr, self.learn.train_iter / num_it)}

    def before_fit(self):
        self.hps = {'lr': []}

    def after_batch(self):
        if self.learn.smooth_loss is not None:
            loss = float(self.learn.smooth_loss)
            self.best_loss = min(self.best_loss, loss)
            if self.stop_div and not loss <= 4 * self.best_loss:
                raise CancelFitException
        if self.train_iter >= self.num_it:
            raise CancelFitException

    def before_validate(self):
        raise CancelValidException

def minimum(lrs, losses, num_it):
    """A tenth of the rate at which the loss was lowest."""
    return lrs[losses.argmin()] / 10

def steep(lrs, losses, num_it):
    """The rate at which the loss fell most steeply, by the logarithm of the rate."""
    return lrs[(losses.diff() / lrs.log().diff()).argmin()]

def valley(lrs, losses, num_it):
    """The rate in the middle of the longest stretch over which the loss falls.

    Single rises inside do not end it: it is the longest falling subsequence, and the
    rate is that at its last index minus half its length. lrs, losses: tensors (N,).
    """
    length = []
    for loss in losses:
        before = [n for n, earlier in zip(length, losses) if earlier > loss]
        length.append(1 + max(before, default=0))
    end = max(range(len(losses)), key=length.__getitem__)
    return lrs[end - length[end] // 2]

def lr_find(learn, start_lr=1e-7, end_lr=10, num_it=100, stop_div=True, show_plot=True,
            suggest_funcs=(minimum, steep)):
    """Try out learning rates from `start_lr` to `end_lr`, then put everything back.

    num_it, stop_div: see `LRFinder`.
    show_plot: draw the loss by rate; the Recorder's `plot_lr_find` can do it later.
    suggest_funcs: functions of (lrs, losses, num_it), two tensors and an int, that
      return a number: `minimum`, `steep`, `valley`.
    Returns: what these suggest, a named tuple of floats; None without them. Weights,
    optimizer and random numbers are those of before, and no file is written.
    Raises: ValueError without a Recorder, for num_it below 2, or if fewer than two
    losses were numbers.
    """
    check(hasattr(learn, 'recorder'), "lr_find needs it: learn.add_cb(Recorder)")
    check(num_it > 1, f"num_it={num_it}: two rates are the least to compare")
    opt, rng = learn.opt, rng_state()
    opt_state = copy.deepcopy(opt and opt.state_dict())
    put_back = [keep_tensors(o) for o in (learn.model, learn.loss_func)]
    put_back += [keep_scaler(cb) for cb in learn.cbs if cb.name == 'mixed_precision']
    put_back += [functools.partial(g.set_state, g.get_state())
                 for g in generators_of(learn.dls.train)]
    try:
        with learn.no_logging():
            finder = LRFinder(start_lr, end_lr, num_it, stop_div)
            learn.fit(num_it, cbs=finder)    # which ends it after num_it batches
    finally:
        set_rng_state(rng)
        for restore in put_back:
            restore()
        learn.opt = opt
        if opt is not None:
            opt.restore(opt_state)
    found = suggest_lrs(learn.recorder, num_it, suggest_funcs)
    if show_plot:
        learn.recorder.plot_lr_find(suggestions=found)
    return found

def keep_tensors(module):
    """Copy all parameters and buffers of `module`; returns what puts them back."""
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    places = [(d, k) for m in modules for d in (m._parameters, m._buffers) for k in d]
    is_lazy = any(nn.parameter.is_lazy(d[k]) for d, k in places)
    check(not is_lazy, "the model has lazy layers: call it on a batch, then lr_find")
    kept = [(d, k, None if d[k] is None else d[k].detach().clone()) for d, k in places]

    @torch.no_grad()
    def put_back():
        for tensors, k, t in kept:
            now = tensors[k]
            if now is None or t is None or now.shape != t.shape:
                tensors[k] = t    # a buffer that was made, dropped or replaced
            else:
                now.copy_(t)
    return put_back

def keep_scaler(mixed_precision):
    """Lend the callback a copy of its scaler; returns what puts the original back."""
    scaler = mixed_precision.scaler
    mixed_precision.scaler = copy.deepcopy(scaler)
    return functools.partial(setattr, mixed_precision, 'scaler', scaler)

def suggest_lrs(recorder, num_it, suggest_funcs):
    """What the functions say of the losses that are numbers, a named tuple.

    If there are more than num_it // 10 + 7, without the first tenth and the last five.
    """
    if not suggest_funcs:
        return None
    lrs = torch.tensor(recorder.lrs)
    losses = torch.tensor([float(v) for v in recorder.losses])
    lrs, losses = lrs[losses.isfinite()], losses[losses.isfinite()]
    if len(losses) > num_it // 10 + 7:
        lrs, losses = lrs[num_it // 10:-5], losses[num_it // 10:-5]
    check(len(losses) > 1, "the loss was a number fewer than two times")
    names = [func_name(f) for f in listify(suggest_funcs)]
    found = [float(f(lrs, losses, num_it)) for f in listify(suggest_funcs)]
    return namedtuple('SuggestedLRs', names, rename=True)(*found)

# --------------------------------------------------------------------------------------
# 10. Inference: predictions in the order of the data, which disturb nothing
#     Needs: 2 to 7. Tested by: lesson 10.
# --------------------------------------------------------------------------------------

@contextmanager
def validation_context(learn, cbs=None):
    """Context for predictions, also in the middle of a training: nothing is disturbed.

    cbs: callbacks for the time being. Callbacks that have `rests` are away; nothing is
    printed; the model is on the device of `dls`, in evaluation mode, without gradients.
    Only what the model itself keeps, such as hidden states, is out of reach.
    """
    names = 'dl xb yb pred loss iter n_iter training completed failing'
    kept = {k: getattr(learn, k) for k in names.split()}
    modes = {m: m.training for m in learn.model.modules()}
    resting = [cb for cb in learn.cbs if cb.rests]
    try:
        with learn.no_logging(), learn.removed_cbs(resting), learn.added_cbs(cbs), \
                torch.no_grad():
            learn.model.to(learn.dls.device).eval()
            learn.training = False
            yield learn
    finally:
        for m, mode in modes.items():
            m.training = mode
        vars(learn).update(kept)

def run_validation(learn, dl, cbs):
    """One pass over `dl`, with its events, in a `validation_context`."""
    with validation_context(learn, cbs), own_generators(dl):
        learn.dl = dl
        learn._stage('validate', learn.all_batches, CancelValidException)

@contextmanager
def own_generators(dl):
    """Context in which a torch DataLoader draws nothing from the global generator."""
    parts = [part for part in parts_of(dl) if getattr(part, 'generator', 0) is None]
    for part in parts:
        part.generator = new_generator()
    try:
        yield
    finally:
        for part in parts:
            part.generator = None

def new_generator():
    """A generator that follows from `set_seed`, but takes no number; each another."""
    seed = (torch.initial_seed() + next(GENERATOR_NUMBERS)) % 2**63
    return torch.Generator().manual_seed(seed)

GENERATOR_NUMBERS = itertools.count(1)

def ordered_loader(dl):
    """A loader of all rows that `dl` draws from, in order; `dl` if these are unknown.

    All rows of the data set, or those of a SubsetRandomSampler, in the order of its
    indices; nothing is dropped. Where rows are known, it is always a new loader.
    """
    if isinstance(dl, TensorLoader):
        return TensorLoader(*dl.dataset.tensors, bs=dl.bs)
    if not is_torch_loader(dl):
        return dl
    if isinstance(dl.sampler, data_tools.SubsetRandomSampler):
        return loader_of_rows(dl, list(dl.sampler.indices))
    known = (data_tools.SequentialSampler, data_tools.RandomSampler)
    return loader_of_rows(dl, None) if isinstance(dl.sampler, known) else dl

def is_torch_loader(dl):
    """Whether `dl` is a torch DataLoader that makes batches in torch's own way."""
    iterates = getattr(type(dl), '__iter__', None)
    as_usual = iterates is data_tools.DataLoader.__iter__
    return as_usual and (dl.batch_size is not None or dl.batch_sampler is None)

def loader_of_rows(dl, rows, training=None):
    """A loader like `dl` of the given rows of its data set, in this order.

    rows: a list or range of ints; None: all.
    training: a loader that says whether to drop the last batch, and which generator
      seeds worker processes; default: nothing is dropped, and the generator is a new
      one, so that no number is drawn from torch's global one.
    """
    drop_last = training is not None and training.drop_last
    if isinstance(dl, TensorLoader):
        device = dl.dataset.tensors[0].device
        rows = torch.as_tensor(rows, dtype=torch.long, device=device)
        tensors = [t[rows] for t in dl.dataset.tensors]
        return TensorLoader(*tensors, bs=dl.bs, drop_last=drop_last)
    dataset = dl.dataset if rows is None else data_tools.Subset(dl.dataset, rows)
    generator = new_generator() if training is None else training.generator
    return data_tools.DataLoader(
        dataset, dl.batch_size, num_workers=dl.num_workers, collate_fn=dl.collate_fn,
        pin_memory=dl.pin_memory, worker_init_fn=dl.worker_init_fn, drop_last=drop_last,
        generator=generator)

class GatherMetricsCallback(Callback):
    """Measures the loss and copies of the learner's metrics over one pass."""
    order = 50

    def before_validate(self):
        metrics = [mk_metric(m) for m in listify(self.learn.metrics)]
        # subtle: a deep copy of a callback's method would copy callback and learner
        shallow = (AvgMetric, ValueMetric)
        self.measures = [AvgLoss(), *(copy.copy(m) if isinstance(m, shallow) else
                                      copy.deepcopy(m) for m in metrics)]
        for m in self.measures:
            m.reset()

    def after_batch(self):
        if self.completed and self.yb:
            for m in self.measures:
                m.accumulate(self.learn)

    def after_validate(self):
        for m in self.measures:
            m.gather(self.learn)

def pick_loader(learn, ds_idx, dl):
    """`dl`, or loader number `ds_idx`. Raises: ValueError if there is none."""
    if dl is None and ds_idx < len(learn.dls.loaders):
        dl = learn.dls[ds_idx]
    check(dl is not None, f"ds_idx={ds_idx}: there is no such loader; pass one as dl=")
    return dl

def validate(learn, ds_idx=1, dl=None, cbs=None):
    """`[loss, *metrics]`, plain numbers, of all rows of loader `ds_idx`, or of `dl`."""
    gather, dl = GatherMetricsCallback(), ordered_loader(pick_loader(learn, ds_idx, dl))
    run_validation(learn, dl, [gather, *listify(cbs)])
    return [plain_number(m.value) for m in gather.measures]

class GatherPredsCallback(Callback):
    """Collects inputs, predictions, targets and losses of one pass, on the CPU.

    act: function applied to predictions.
    save_preds, save_targs: folders to write them to, a file a batch, and keep none.
    """
    order = 50

    def __init__(self, act=None, with_input=False, with_loss=False, save_preds=None,
                 save_targs=None):
        self.act, self.with_input, self.with_loss = act, with_input, with_loss
        self.save_preds, self.save_targs = save_preds, save_targs

    def before_validate(self):
        self.inputs, self.preds, self.targets, self.losses = [], [], [], []

    def after_batch(self):
        learn = self.learn
        if not learn.completed:
            return
        pred = learn.pred if self.act is None else self.act(learn.pred)
        self.keep(self.preds, pred, self.save_preds)
        if learn.yb:
            self.keep(self.targets, learn.y, self.save_targs)
        if self.with_input:
            self.keep(self.inputs, learn.x)
        if self.with_loss:
            check(learn.yb, "with_loss=True: without targets there is no loss")
            self.keep(self.losses, learn.loss.reshape(find_bs(learn.yb), -1).mean(1))

    def after_validate(self):
        if self.completed:    # else the processes may hold unlike numbers of batches
            for kept in (self.inputs, self.preds, self.targets, self.losses):
                kept[:] = [b for part in self.learn.gather(kept) for b in part]

    def keep(self, kept, b, folder=None):
        """Append `b`, on the CPU, or write it to `folder`: '000_00012.pt', batch 12.

        000 is the process; those outside of a `distrib_ctx` leave it to the first.
        """
        b, rank = self.learn.to_detach(b, gather=False), process_rank()
        if folder is None:
            kept.append(b)
        elif rank == 0 or 'distributed' in vars(self.learn):
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save(b, Path(folder) / f'{rank:03}_{self.learn.iter:05}.pt')

def concat(parts, dim=0):
    """Join tensors, or tuples of them that are nested alike, along `dim`."""
    if not parts:
        return None
    if isinstance(parts[0], (tuple, list)):
        joined, kind = [concat(list(p), dim) for p in zip(*parts)], type(parts[0])
        return kind(*joined) if hasattr(kind, '_fields') else kind(joined)
    return torch.cat(parts, dim)

def act_and_decodes(loss_func):
    """Functions from model output to prediction, and from prediction to decision.

    The loss function's own `activation` and `decodes`; else softmax and largest class
    for cross-entropy, over dimension 1; sigmoid and above 0.5 for binary cross-entropy
    with logits; also through a `partial`, and for each of a tuple of outputs.
    """
    f, bce = getattr(loss_func, 'func', loss_func), F.binary_cross_entropy_with_logits
    act = decodes = lambda t: t
    if isinstance(f, nn.CrossEntropyLoss) or f is F.cross_entropy:
        act, decodes = lambda t: t.softmax(1), lambda t: t.argmax(1)
    if isinstance(f, nn.BCEWithLogitsLoss) or f is bce:
        act, decodes = torch.sigmoid, lambda t: t > 0.5
    act, decodes = (functools.partial(map_tensors, o) for o in (act, decodes))
    return getattr(loss_func, 'activation', act), getattr(loss_func, 'decodes', decodes)

def get_preds(learn, ds_idx=1, dl=None, with_input=False, with_decoded=False,
              with_loss=False, act=None, inner=False, reorder=True, cbs=None,
              save_preds=None, save_targs=None, concat_dim=0):
    """Predictions and targets of all rows of loader number `ds_idx`, or of `dl`.

    with_input, with_decoded, with_loss: return these as well; losses are (N,).
    act: function applied to predictions; default: what suits the loss function.
    inner: accepted as in fastai; predicting in the middle of a training always works.
    reorder: all rows in the order of the data set, though the loader shuffles or drops
      some; False takes the batches of the loader as they come.
    cbs: callbacks for this call.
    save_preds, save_targs: folders to save to, a file per batch; then None is in their
      place.
    concat_dim: the batch dimension.
    Returns: ([inputs,] preds, targets[, decoded][, losses]); tensors on the CPU.
    """
    dl = pick_loader(learn, ds_idx, dl)
    dl = ordered_loader(dl) if reorder else dl
    default_act, decodes = act_and_decodes(learn.loss_func)
    act = default_act if act is None else act
    gather = GatherPredsCallback(act, with_input, with_loss, save_preds, save_targs)
    with learn.loss_not_reduced() if with_loss else nullcontext():
        run_validation(learn, dl, [gather, *listify(cbs)])
    preds = concat(gather.preds, concat_dim)
    result = [concat(gather.inputs, concat_dim)] if with_input else []
    result += [preds, concat(gather.targets, concat_dim)]
    result += [decodes(preds)] if with_decoded else []
    return (*result, *([concat(gather.losses)] if with_loss else []))

def predict(learn, item, with_input=False):
    """Prediction for one `item`: a tensor or array without batch dimension, or a tuple.

    Returns: ([input,] what a person reads, by `vocab` or `decode` of the DataLoaders;
    the decoded prediction; the prediction).
    Raises: ValueError, with its shape, for an item that the model cannot take.
    """
    items = item if isinstance(item, tuple) else (item,)
    items = tuple(torch.as_tensor(o, dtype=torch.get_default_dtype())
                  if str(getattr(o, 'dtype', '')) == 'float64' else torch.as_tensor(o)
                  for o in items)    # NumPy's default is not torch's
    batch = tuple(o[None] for o in items)
    with contextmanager(replacing_yield)(learn.dls, 'n_inp', len(batch)):
        try:
            pred, _, decoded = get_preds(learn, dl=[batch], with_decoded=True)
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            shapes = ', '.join(str(list(o.shape)) for o in items)
            raise ValueError(f"cannot predict for an item of shape {shapes}: give one "
                             f"like dls.train_ds[0][0], without batch ({e})") from e
    pred, decoded = (map_tensors(lambda t: t[0], o) for o in (pred, decoded))
    result = (learn.dls.decoded(decoded), decoded, pred)
    return (detuplify(items), *result) if with_input else result

def show_results(learn, ds_idx=1, dl=None, max_n=9, shuffle=True, ax=None):
    """Draw up to `max_n` samples, target over prediction; returns the array of axes.

    shuffle: any of a batch, not the first ones. For inputs and ax see `show_samples`.
    """
    batch = [next(iter(ordered_loader(pick_loader(learn, ds_idx, dl))))]
    x, _, y, decoded = get_preds(learn, dl=batch, with_input=True, with_decoded=True)
    check(y is not None, "show_results shows targets, and the batches have none")
    generator = torch.Generator()
    generator.seed()    # by chance, but not at the cost of the global generator
    order = torch.randperm(len(decoded), generator=generator) if shuffle else \
        torch.arange(len(decoded))
    titles = [f'{learn.dls.decoded(y[i])}\n{learn.dls.decoded(decoded[i])}'
              for i in order[:max_n]]
    x = x[0] if isinstance(x, tuple) else x
    return show_samples(x[order[:max_n]], titles, ax)

def tta(learn, ds_idx=1, dl=None, n=4, item_tfms=None, batch_tfms=None, beta=0.25,
        use_max=False):
    """Test time augmentation: the mean of `n` augmented passes, mixed with a plain one.

    item_tfms, batch_tfms: functions that augment an input, or a batch of them (of the
      first, if there are several); without these it is up to the data set.
    beta: weight of the plain predictions; None returns `(augmented, plain)` alone.
    use_max: the largest of all predictions instead of means. Returns: (preds, targets).
    """
    def augment(self):
        x, *others = self.xb
        if item_tfms is not None:
            x = torch.stack([item_tfms(item) for item in x])
        self.learn.xb = (x if batch_tfms is None else batch_tfms(x), *others)
    cb = Callback(before_batch=augment)
    passes = torch.stack([get_preds(learn, ds_idx, dl, cbs=cb)[0] for _ in range(n)])
    augmented = passes.amax(0) if use_max else passes.mean(0)
    plain, targets = get_preds(learn, ds_idx, dl)
    if beta is None:
        return augmented, plain
    mixed = torch.maximum(augmented, plain) if use_max else augmented.lerp(plain, beta)
    return mixed, targets

# --------------------------------------------------------------------------------------
# 11. Saving: files that open with stock torch.load, and never run code
#     Needs: 2, 4 to 6. Tested by: lesson 11.
# --------------------------------------------------------------------------------------

def bare_model(model):
    """The model inside wrappers such as those of torch.compile and DataParallel."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel) or hasattr(model, '_orig_mod'):
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return model

def bare_state(model):
    """State dict of `model` under the keys that it has if no part is wrapped."""
    return {bare_key(k): v for k, v in bare_model(model).state_dict().items()}

def module_state(o):
    """State dict of `o`; empty if it is no module but, say, a function."""
    return o.state_dict() if isinstance(o, nn.Module) else {}

def bare_key(k):
    """A key of a state dict without the marks of compiled parts."""
    return k.replace('_orig_mod.', '')

def save_model(file, model, opt, with_opt=True, pickle_protocol=2):
    """Write the state dict of `model` and, if given and `with_opt`, that of `opt`.

    file: a path, whose missing folders are made, or an open file; returned. With an
    optimizer it holds `{'model': ..., 'opt': ...}`, else the bare state dict. A path is
    replaced in one go, after all is written.
    Raises: OSError or RuntimeError if that fails; the previous file is then as before.
    """
    state = bare_state(model)
    if with_opt and opt is not None:
        state = {'model': state, 'opt': opt.state_dict()}
    save_state(state, file, pickle_protocol)
    return file

def save_state(state, file, pickle_protocol=2):
    """`torch.save`, to a path in one go: a crash or full disk leaves what was there.

    Of several processes only the first writes, and nobody waits for it.
    """
    if hasattr(file, 'write'):
        return torch.save(state, file, pickle_protocol=pickle_protocol)
    if process_rank() > 0:
        return    # of several processes, the first one writes
    file = Path(file).resolve()    # through links, which should stay
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f'{file.name}.{os.getpid()}.tmp')
    try:
        with open(unfinished, 'wb') as f:
            torch.save(state, f, pickle_protocol=pickle_protocol)
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)

def load_state(file, device='cpu', weights_only=True):
    """What `save_state` wrote, on `device` (None: where it was).

    weights_only: run no code of the file; then it holds tensors and plain containers.
    Raises: OSError; ValueError, naming the file, for a damaged or foreign one.
    """
    with nullcontext(file) if hasattr(file, 'read') else open(file, 'rb') as f:
        try:
            start, broken = f.tell(), zipfile.ZipFile(f).testzip()
            check(broken is None, f"wrong checksum in {broken}")
            f.seek(start)
            return torch.load(f, map_location=device, weights_only=weights_only)
        except Exception as e:
            raise ValueError(f"cannot load {file} (is it torch.save's?): {e!r}") from e

def load_model(file, model, opt, with_opt=None, device=None, strict=True):
    """Load what `save_model` wrote into `model` and `opt`, wherever these live.

    file: a path or an open file; no code in it is run.
    with_opt: whether to load the optimizer; None: if it is in the file.
    device: where the file is read to on the way; default: the CPU.
    strict: the file must have all keys of the model, and no others.
    Raises: FileNotFoundError; ValueError, naming the file and the keys, if it is
    damaged or does not fit. Then nothing has changed.
    """
    state = load_state(file, device or 'cpu')
    put_weights(file, state, model, opt, with_opt, strict)

def put_weights(file, state, model, opt, with_opt=None, strict=True):
    """Load `state`, which was read from `file`, into `model` and `opt`, or raise.

    Keys may have the marks that wrappers leave: `module.` and `_orig_mod.`.
    """
    both = isinstance(state, dict) and state.keys() >= {'model', 'opt'}
    weights, opt_state = (state['model'], state['opt']) if both else (state, None)
    ok = isinstance(weights, dict) and all(isinstance(k, str) for k in weights)
    check(ok, f"{file} holds no model: {type(weights).__name__}")
    own_state = bare_model(model).state_dict()
    own = {bare_key(k): k for k in own_state}
    bare = {bare_key(k): v for k, v in weights.items()}
    bare = {k if k in own else k.removeprefix('module.'): v for k, v in bare.items()}
    check_weights(file, bare, {k: own_state[own[k]] for k in own}, strict)
    ok = not with_opt or None not in (opt, opt_state)
    check(ok, f"with_opt=True, but {file} or the learner has none: leave it out")
    if opt is not None and opt_state is not None and with_opt is not False:
        try:
            opt.load_state_dict(opt_state)
        except Exception as e:
            raise ValueError(f"{file}: its optimizer does not fit, {e}; to leave it "
                             "out, use with_opt=False") from e
    weights = {own[k]: v for k, v in bare.items() if k in own}
    bare_model(model).load_state_dict(weights, strict=False)

def check_weights(file, weights, own, strict):
    """Raise ValueError, listing them, for keys or shapes in which two states differ.

    Tensors without plain values (sparse, meta) never fit, a lazy layer takes any shape.
    """
    def kind(v):
        if not isinstance(v, torch.Tensor):
            return type(v).__name__
        is_usual = v.layout == torch.strided and not v.is_meta
        return list(v.shape) if is_usual else f'{v.layout} on {v.device}'
    common = [k for k in own.keys() & weights if not nn.parameter.is_lazy(own[k])]
    wrong = [f'{k} is {kind(weights[k])}, not {kind(own[k])}'
             for k in common if kind(weights[k]) != kind(own[k])]
    if strict:
        wrong += [f'lacks {k}' for k in own.keys() - weights]
        wrong += [f'has {k} too many' for k in weights.keys() - own]
    check(not wrong, f"{file} does not fit the model: {'; '.join(sorted(wrong))}")

def export(learn, fname='export.pkl', pickle_protocol=2):
    """Write the learner, without data and optimizer, to learn.path/fname; the path.

    Its `dls` keeps one empty training loader, its logger is `print`, and the callback
    of a `distrib_ctx` stays away.
    For `load_learner`. Of functions and classes only the names are saved: where it is
    loaded, these must be there to import.
    Raises: ValueError, which names it, if something cannot be pickled.
    """
    file, kept = learn.path / fname, dict(vars(learn))
    distributed = [cb for cb in learn.cbs if cb.name == 'distributed']
    learn.dls, learn.opt, learn.logger = copy.copy(learn.dls), None, print
    learn.parallel = None
    no_data = dict(loaders=[[]], train=[], valid=None, train_ds=None, valid_ds=None)
    vars(learn.dls).update(no_data)
    learn._forget_batch()
    try:
        with learn.removed_cbs(distributed):
            for o in (learn, *learn.cbs):
                check_picklable(o, learn)
            save_state(learn, file, pickle_protocol)
    finally:
        vars(learn).update(kept)
    return file

def check_picklable(o, learn):
    """Raise ValueError, naming it, for an attribute of `o` that cannot be pickled."""
    for k, v in vars(o).items():
        if v is learn or isinstance(v, Callback) or k == '_cbs' or k == '_handlers':
            continue
        try:
            pickle.dumps(v)
        except Exception as e:
            raise ValueError(f"cannot export {k}={v!r} of the {type(o).__name__}: {e}; "
                             "use a function or class that a module defines") from e

def load_learner(fname, cpu=True):
    """Loading runs code of the file: open only what you trust. The Learner of `export`.

    fname: path or open file. cpu: on the CPU; else on the device that it was on.
    Raises: OSError; ValueError, naming the file, if it holds no Learner.
    """
    learn = load_state(fname, 'cpu' if cpu else None, weights_only=False)
    check(isinstance(learn, Learner), f"{fname} holds a {type(learn).__name__}")
    if cpu:
        learn.dls.cpu()
    return learn

# --------------------------------------------------------------------------------------
# 12. A shelf of callbacks: take what you need
#     Needs: 2 to 8, 11. Tested by: lesson 12.
# --------------------------------------------------------------------------------------

class TerminateOnNaNCallback(Callback):
    """Ends the training before an infinite loss, or none at all, reaches the weights.

    It reads the loss of every batch, and so waits for the device.
    """
    order = -9

    def after_loss(self):
        if not self.training:
            return
        loss = self.loss.detach()
        loss = gather_rows(loss) if self.parallel else loss    # stop together
        if not loss.isfinite().all():
            raise CancelFitException

class TrackerCallback(Callback):
    """Watches a column of the Recorder: after each epoch `new_best` says if it is best,
    `measured` if there was a value.

    monitor: title of the column.
    comp: `comp(a, b)` is True if a is better than b; default: less for titles with loss
      or error, else greater.
    min_delta: by how much it has to be better.
    reset_on_fit: forget the best when a fit begins.
    Raises: ValueError without a Recorder; for an unknown monitor it lists the columns.
    """
    order, rests = 60, True

    def __init__(self, monitor='valid_loss', comp=None, min_delta=0.,
                 reset_on_fit=True):
        less = 'loss' in monitor or 'error' in monitor
        self.comp = comp or (operator.lt if less else operator.gt)
        self.monitor, self.min_delta = monitor, min_delta
        self.reset_on_fit, self.best = reset_on_fit, None

    def before_fit(self):
        self.run = 'lr_finder' not in vars(self.learn)    # which is no training
        if not self.run:
            return
        if self.reset_on_fit:
            self.best = None
        check(hasattr(self.learn, 'recorder'), f"{self!r} needs the Recorder")
        names = [name for name in self.recorder.metric_names[1:] if name != 'time']
        check(self.monitor in names, f"monitor={self.monitor!r}: there are {names}")
        self.column, self.new_best, self.n_rows = names.index(self.monitor), False, 0

    def after_epoch(self):
        rows, self.new_best = self.recorder.values, False
        value = rows[-1][self.column] if len(rows) > self.n_rows else None
        self.n_rows, self.measured = len(rows), value is not None
        if value is None or value != value:
            return      # an epoch or pass that was cancelled; or NaN
        # the sign of what is better, by asking
        delta = -self.min_delta if self.comp(1, 0) else self.min_delta
        self.new_best = self.best is None or bool(self.comp(value + delta, self.best))
        self.best = value if self.new_best else self.best

class EarlyStoppingCallback(TrackerCallback):
    """Ends the training after `patience` epochs in a row that were not the best.

    An epoch without a value, skipped or cancelled, does not count.
    The other parameters: see `TrackerCallback`.
    """
    order = 61

    def __init__(self, monitor='valid_loss', comp=None, min_delta=0., patience=1,
                 reset_on_fit=True):
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        check(patience >= 1, f"patience={patience}: give 1 epoch or more")
        self.patience = patience

    def before_fit(self):
        self.wait = 0
        super().before_fit()

    def after_epoch(self):
        super().after_epoch()
        self.wait = 0 if self.new_best else self.wait + self.measured
        if self.wait >= self.patience:
            raise CancelFitException

class SaveModelCallback(TrackerCallback):
    """Saves the model whenever it is best, and loads the best at the end of the fit.

    fname: see `Learner.save`.
    every_epoch: instead, save all epochs as fname_0, fname_1, ...; an int n: those that
      n divides.
    at_end: save at the end of the fit, instead of loading.
    with_opt: the optimizer as well.
    The other parameters: see `TrackerCallback`.
    """
    def __init__(self, monitor='valid_loss', comp=None, min_delta=0., fname='model',
                 every_epoch=False, at_end=False, with_opt=False, reset_on_fit=True):
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        self.fname, self.every_epoch = fname, every_epoch
        self.at_end, self.with_opt, self.saved = at_end, with_opt, False

    def before_fit(self):
        self.saved = self.saved and not self.reset_on_fit
        super().before_fit()

    def after_epoch(self):
        super().after_epoch()
        if self.every_epoch:
            if self.completed and self.epoch % int(self.every_epoch) == 0:
                self.learn.save(f'{self.fname}_{self.epoch}', self.with_opt)
        elif self.new_best:
            self.learn.save(self.fname, self.with_opt)
            self.saved = True

    def after_fit(self):
        if self.at_end:
            self.learn.save(self.fname, self.with_opt)
        elif self.saved:
            self.learn.load(self.fname)

class CheckpointCallback(Callback):
    """Saves a training after its epochs; if the file is there, a fit goes on from it.

    fname: see `Learner.save`; `Learner.load` reads the weights of such a file, too.
    every: save after each `every`-th epoch, and at the end of the fit.
    resume: False begins anew, and replaces the file.
    Kept are model, loss function, optimizer, what callbacks keep (see their
    `state_dict`), and random numbers, also of torch loaders: killed at any time and
    started again by the same command, a training on the CPU ends with the same bits.
    Not kept: buffers that are not in the state dict, numbers of persistent workers.
    Of several fits with the same object, as in `fine_tune`, finished ones are passed
    over: nothing is trained and no callback runs. The weights then are those of the
    fit's end for the last of them only, so save no model between two fits.
    Raises: ValueError, before anything changes, for a file of another training.
    """
    order = math.inf    # last: so it saves what the others have done

    def __init__(self, fname, every=1, resume=True):
        is_path = isinstance(fname, (str, Path))
        check(is_path, f"fname={fname!r}: give the path of a file", TypeError)
        check(every >= 1, f"every={every}: give 1 epoch or more")
        self.fname, self.every, self.resume, self.n_fits = fname, every, resume, 0
        self.file = None

    def before_fit(self):
        self.run = 'lr_finder' not in vars(self.learn)    # which is no training
        self.ended = self.passed_over = False
        self.file = Path(self.learn.model_file(self.fname))
        if self.run and self.resume and self.file.exists():
            self.load_training(load_state(self.file))

    def after_epoch(self):
        n_done = self.epoch + 1
        if self.completed and n_done % self.every == 0:
            self.save(n_done)

    def after_cancel_fit(self):
        self.ended = True

    def after_fit(self):
        if self.file and (self.ended or self.completed):    # else it was interrupted
            self.n_fits += 1
            if not self.passed_over:
                self.save(0)

    def save(self, n_done):
        if process_rank() == 0:
            for left in self.file.resolve().parent.glob(f'{self.file.name}.*.tmp'):
                left.unlink(missing_ok=True)    # of a process killed while it saved
        save_state(self.training_state(n_done), self.file)

    def state_dict(self):
        """Nothing: n_fits is in the file already."""
        return {}

    def plan(self):
        """What has to be the same for a fit to go on where another one stopped."""
        cbs = [cb.name for cb in self.learn.cbs]
        titles = self.recorder.metric_names if 'recorder' in cbs else []
        return {'n_epoch': self.n_epoch, 'n_iter': loader_len(self.dls.train),
                'cbs': cbs, 'metric_names': titles, 'processes': n_processes()}

    def generators(self):
        return [g for dl in self.dls.loaders for g in generators_of(dl)]

    def training_state(self, n_done):
        learn = self.learn
        state = {'model': bare_state(learn.model), 'opt': learn.opt.state_dict(),
                 'loss_func': module_state(learn.loss_func),
                 'frozen_idx': learn.opt.frozen_idx,
                 'requires_grad': [p.requires_grad for p in learn.model.parameters()],
                 'generators': [g.get_state() for g in self.generators()],
                 'cbs': [cb.state_dict() for cb in learn.cbs], 'plan': self.plan(),
                 'n_fits': self.n_fits, 'n_done': n_done, 'iter': learn.train_iter,
                 'rng': learn.gather(rng_state())}
        for o, kept in [('the learner', {**state, 'cbs': None}),
                        *zip(learn.cbs, state['cbs'])]:
            wrong = [k for k, v in kept.items() if not is_plain(v)]
            check(not wrong, f"the state of {o!r} holds more than numbers, strings and "
                  f"tensors in {wrong}: give it a state_dict and a load_state_dict",
                  TypeError)
        return state

    def load_training(self, state):
        """Go on if the file was saved in or after this fit, the one after `n_fits`.

        The file has `n_fits` finished fits, and `n_done` epochs of the next one.
        """
        ok = isinstance(state, dict) and 'n_fits' in state
        check(ok, f"{self.file} is no checkpoint: delete it, or take another name")
        self.passed_over = state['n_fits'] > self.n_fits
        is_end = state['n_fits'] == self.n_fits + 1 and not state['n_done']
        is_within = state['n_fits'] == self.n_fits and state['n_done']
        if is_end or is_within:
            self.check_same_training(state)
            self.go_on_from(state)
        if self.passed_over:
            warnings.warn(f"{self.file} holds this training complete: nothing to do")
            self.learn.start_epoch = self.n_epoch
            for cb in self.learn.cbs:
                cb.run = cb is self

    def check_same_training(self, state):
        wrong = [f"{k} {state['plan'][k]}, here {v}" for k, v in self.plan().items()
                 if state['plan'][k] != v]
        check(not wrong, f"{self.file} is of another training: {'; '.join(wrong)}. "
              "resume=False replaces it; or give learn.load this file, and fit without "
              f"it from start_epoch={state['n_done']}")
        own = module_state(self.learn.loss_func)
        check_weights(self.file, state['loss_func'], own, strict=True)

    def go_on_from(self, state):
        learn = self.learn
        put_weights(self.file, state, learn.model, learn.opt)
        if state['loss_func']:
            learn.loss_func.load_state_dict(state['loss_func'])
        for p, requires_grad in zip(learn.model.parameters(), state['requires_grad']):
            p.requires_grad_(requires_grad)
        learn.opt.frozen_idx = state['frozen_idx']
        for cb, cb_state in zip(learn.cbs, state['cbs']):
            cb.load_state_dict(to_device(cb_state, learn.dls.device))
        for generator, generator_state in zip(self.generators(), state['generators']):
            generator.set_state(generator_state)
        learn.start_epoch, learn.train_iter = state['n_done'], state['iter']
        set_rng_state(state['rng'][process_rank()])

class GradientClip(Callback):
    """Scales all gradients down together if their norm exceeds `max_norm`."""
    def __init__(self, max_norm=1., norm_type=2.):
        self.max_norm, self.norm_type = max_norm, norm_type

    def before_step(self):
        params = self.model.parameters()
        nn.utils.clip_grad_norm_(params, self.max_norm, self.norm_type)

class GradientAccumulation(Callback):
    """Steps once every `n_acc` samples, as if they had come in one batch.

    The last batch of an epoch steps with what there is. For losses that are means.
    Several processes count their samples together. `flushing` is True while left-over
    samples step after a pass, as a loader without length does not tell its last batch.
    """
    order, run_valid = -5, False

    def __init__(self, n_acc=32):
        self.n_acc = n_acc

    def before_train(self):
        self.count, self.carried, self.flushing = 0, [], False

    def before_backward(self):
        self.learn.loss = self.loss * find_bs(self.yb)    # sums add up over batches

    def after_backward(self):
        if self.completed:
            self.count += find_bs(self.yb)

    def before_step(self):
        params = [p for p in self.model.parameters() if p.grad is not None]
        is_last = self.flushing or self.iter + 1 == self.n_iter
        n = n_processes() if self.parallel else 1
        if self.count * n < self.n_acc and not is_last:
            self.carried = [(p, p.grad) for p in params]
            raise CancelStepException
        for p in params:
            p.grad /= max(1, self.count)
        self.count = 0

    def after_batch(self):
        for p, grad in self.carried:
            p.grad = grad    # the loop has forgotten it
        self.carried = []

    def after_train(self):
        completed = self.completed
        if self.count and completed:    # the loader did not tell its last batch
            self.flushing = True
            self.learn._stage('step', self.opt.step, CancelStepException)
            self.learn.completed = completed
        self.opt.zero_grad()

class MixedPrecision(Callback):
    """Predicts and computes the loss in half precision; weights stay float32.

    amp_mode: 'fp16' or 'bf16'. float16 needs CUDA, elsewhere it is bfloat16. Its small
      range needs a scaler: it multiplies the loss, divides the gradients, and skips a
      step with gradients that are not finite, which waits for the device.
    Source: Micikevicius and others, 'Mixed Precision Training', 2018.
    """
    order = -4    # gradients are unscaled after accumulating, before clipping

    def __init__(self, amp_mode='fp16'):
        ok = amp_mode in ('fp16', 'bf16')
        check(ok, f"amp_mode={amp_mode!r}: give 'fp16' or 'bf16'")
        self.amp_mode, self.scaler, self.finite = amp_mode, None, None
        self.warned = False

    def autocast(self):
        """The context in which torch chooses the precision of each operation."""
        device = self.dls.device.type
        half = torch.float16 if self.is_fp16() else torch.bfloat16
        return torch.autocast(device, half, enabled=self.run)

    def is_fp16(self):
        """Whether it is float16 that is used, with a scaler."""
        return self.amp_mode == 'fp16' and self.dls.device.type in FP16_DEVICES

    def before_fit(self):
        device = self.dls.device.type
        if self.is_fp16():
            self.scaler = self.scaler or torch.amp.GradScaler(device)
        elif self.amp_mode == 'fp16' and not self.warned:
            warnings.warn(f"no training in float16 on {device}: bfloat16 instead")
            self.warned = True

    def after_pred(self):
        self.learn.pred = map_tensors(as_float32, self.pred)

    def before_backward(self):
        if self.scaler:
            self.learn.loss = self.scaler.scale(self.loss)

    def before_step(self):
        if self.scaler and self.opt.all_params(with_grad=True):
            self.finite = False
            # subtle: it takes this object for the optimizer, and calls `step` below
            # if the gradients are finite; the loop makes the real step after clipping
            self.scaler.unscale_(self)
            self.scaler.step(self)
            if not self.finite:
                raise CancelStepException

    def after_step(self):
        if self.finite is not None:    # else there was no step to take
            self.scaler.update()
            self.finite = None

    def step(self):
        """What the scaler calls if all gradients are finite."""
        self.finite = True

    def state_dict(self):
        """That of the scaler, if there is one."""
        return {'scaler': self.scaler.state_dict()} if self.scaler else {}

    def load_state_dict(self, state):
        """Take it over, if there is a scaler here, too."""
        if self.scaler and 'scaler' in state:
            self.scaler.load_state_dict(state['scaler'])

    param_groups = property(lambda self: self.opt.param_groups)

FP16_DEVICES = {'cuda'}

def as_float32(t):
    """`t` in float32 if it is in half precision, else as it is."""
    return t.float() if t.dtype in HALF else t

def set_precision(learn, amp_mode):
    """Train in 'fp16', 'bf16', or with None in full precision; returns the learner."""
    learn.remove_cbs(MixedPrecision)
    return learn.add_cbs(MixedPrecision(amp_mode) if amp_mode else [])

class ModelResetter(Callback):
    """Calls `model.reset()` before each pass, as recurrent models need it."""
    def before_train(self):
        self.model.reset()

    before_validate = before_train

class RNNRegularizer(Callback):
    """Penalties on activations (alpha) and on their changes over time (beta).

    For models that return (output, raw activations, activations, ...), these two being
    lists of tensors (B, time, C), one for each layer; the last layer counts.
    Source: Merity and others, 'Revisiting Activation Regularization', 2017.
    """
    def __init__(self, alpha=0., beta=0.):
        self.alpha, self.beta = alpha, beta

    def after_pred(self):
        self.learn.pred, self.raw_out, self.out = self.pred[:3]

    def after_loss(self):
        if not self.training:
            return
        steps = self.raw_out[-1].float()
        self.learn.loss = self.loss + self.alpha * self.out[-1].float().pow(2).mean()
        if steps.shape[1] > 1:
            change = steps[:, 1:] - steps[:, :-1]
            self.learn.loss = self.loss + self.beta * change.pow(2).mean()

    def after_batch(self):
        self.raw_out = self.out = None    # they hold the graph

# --------------------------------------------------------------------------------------
# 13. Many processes: the same training on several GPUs, or on several CPU cores
#     Needs: 2 to 6, 10, 12. Tested by: lesson 13.
# --------------------------------------------------------------------------------------

class DistributedCallback(Callback):
    """Each process trains and predicts on its share of the rows; `distrib_ctx` adds it.

    While training, the model runs inside torch's DistributedDataParallel, which
    averages the gradients; it is made anew for each epoch, as layers may have been
    frozen. Shares are those of torch's DistributedSampler: of equal size, so that a few
    rows may come twice. In a pass without training none does, and a loader that cannot
    be split is read by the first process alone.
    kwargs: of DistributedDataParallel.
    Raises: TypeError if the training loader cannot be split.
    """
    order = 90

    def __init__(self, **kwargs):
        self.kwargs = kwargs

    def before_fit(self):
        """Make `sampler`, which shuffles if the loader does, by a seed for all."""
        dl = self.dls.train
        rows = ordered_loader(dl)
        check(rows is not dl, f"{type(dl).__name__} cannot be split: give a "
              "TensorLoader, or a DataLoader over a data set with indices", TypeError)
        random = (data_tools.RandomSampler, data_tools.SubsetRandomSampler)
        shuffle = getattr(dl, 'shuffle', isinstance(getattr(dl, 'sampler', 0), random))
        seed = self.gather(int(torch.randint(2**31, ())))[0]
        self.sampler = data_tools.DistributedSampler(rows.dataset, shuffle=shuffle,
                                                     seed=seed)

    def before_train(self):
        device, dl = self.dls.device, self.dls.train
        self.learn.parallel = nn.parallel.DistributedDataParallel(
            self.model, [device] if device.type == 'cuda' else None, **self.kwargs)
        self.sampler.set_epoch(self.epoch)
        self.learn.dl = loader_of_rows(ordered_loader(dl), list(self.sampler), dl)

    def after_step(self):
        if not self.failing:
            # for whoever looks at the loss from here on; gradients have been averaged
            self.learn.loss = gather_rows(self.loss.detach().mean()).mean()

    def after_train(self):
        self.learn.parallel = None
        for buffer in [] if self.failing else self.model.buffers():
            torch.distributed.broadcast(buffer, 0)    # as the first process saves them

    def before_validate(self):
        rows, rank, n = ordered_loader(self.dl), process_rank(), n_processes()
        if rows is not self.dl:
            size = len(rows.dataset)
            share = range(size * rank // n, size * (rank + 1) // n)
            self.learn.dl = loader_of_rows(rows, share)
        elif rank > 0:
            self.learn.dl = []

    def gather(self, o):
        parts = [None] * n_processes()
        torch.distributed.all_gather_object(parts, o)
        return parts

    def state_dict(self):
        """What decides, with the number of the epoch, who gets which rows."""
        return {'seed': self.sampler.seed}

    def load_state_dict(self, state):
        """Go on with the same shares."""
        self.sampler.seed = state['seed']

@contextmanager
def distrib_ctx(learn, **kwargs):
    """Context in which every process that torchrun has started trains on its share.

        with learn.distrib_ctx():       # torchrun --nproc_per_node=8 script.py
            learn.fit_one_cycle(5)

    GPUs talk by NCCL, CPUs by Gloo. All processes run the same script, and have to make
    the same learner: call `set_seed` first. In each of them, losses, metrics and
    predictions are those of all data; only the first prints and saves. `bs` is the size
    of a batch in each. Whatever is called here is called in all of them, and a callback
    that ends something early has to do so in all: else they wait for each other.
    Without torchrun, the one process trains alone, with a warning. Torch's process
    group is started once, and stays when the context ends.
    kwargs: of DistributedDataParallel. Yields: the learner.
    Raises: ValueError for a device that is neither a GPU of CUDA nor a CPU.
    """
    if 'distributed' in vars(learn):
        yield learn
        return
    if not torch.distributed.is_torchelastic_launched():
        warnings.warn("one process trains alone; for several, type: torchrun "
                      f"--nproc_per_node=2 {Path(sys.argv[0]).name or 'script.py'}")
        yield learn
        return
    device = learn.dls.device
    ok = device.type in ('cuda', 'cpu')
    check(ok, f"no several processes on {device}: give DataLoaders device='cpu'")
    if device.type == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        learn.dls.to(torch.device('cuda', torch.cuda.current_device()))
    if not torch.distributed.is_initialized():    # it stays: torch starts it once
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        torch.distributed.init_process_group(backend)
    quiet = learn.no_logging() if process_rank() > 0 else nullcontext()
    try:
        with quiet, learn.added_cbs(DistributedCallback(**kwargs)):
            yield learn
            learn.gather(None)    # so that what one has saved, all can load
    finally:
        learn.dls.to(device)

# --------------------------------------------------------------------------------------
# 14. Demo: a small network learns MNIST-1D
#     Needs: all above. Tested by: lesson 14.
# --------------------------------------------------------------------------------------

def small_cnn():
    """A network for `mnist1d`: (B, 1, 40) signals to (B, 10) scores; 24,154 weights.

    Body: five blocks of convolution (3 wide, no bias), batch norm, ReLU. Head: a mean,
    a linear layer.
    """
    def block(n_in, n_out, stride):
        conv = nn.Conv1d(n_in, n_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm1d(n_out), nn.ReLU())
    body = nn.Sequential(block(1, 16, 1), block(16, 32, 2), block(32, 32, 1),
                         block(32, 64, 2), block(64, 64, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(body, head)

def demo(argv=None):
    """Train `small_cnn` on MNIST-1D, draw what happened, say how well it went.

    argv: a list of command line arguments (--epochs, --device, --out, --seed); default:
      those of the process. The last line printed has accuracy, published accuracy,
      seconds, and the file of the figure.
    Returns: the test accuracy, a float from 0 to 1.
    """
    parser = argparse.ArgumentParser(description="A small network learns MNIST-1D.")
    parser.add_argument('--epochs', type=int, default=15, help="default: %(default)s")
    parser.add_argument('--device', help="cpu, cuda, ...; default: the best at hand")
    parser.add_argument('--out', default='.', help="folder of the figure; default: .")
    parser.add_argument('--seed', type=int, default=0, help="default: %(default)s")
    args, start = parser.parse_args(argv), time.perf_counter()
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: at least 1")
    set_seed(args.seed)
    train, test = mnist1d()
    dls = DataLoaders.from_tensors(*train, valid=test, device=args.device)
    learn = Learner(dls, small_cnn(), nn.CrossEntropyLoss(), metrics=accuracy)
    learn.fit_one_cycle(args.epochs, 1e-2)
    score, file = learn.final_record[-1], draw_demo(learn, Path(args.out))
    print(f"test accuracy {score:.1%} (published CNN: 94 %), "
          f"{time.perf_counter() - start:.0f} seconds on {dls.device}, figure: {file}")
    return score

def draw_demo(learn, folder):
    """Draw loss, learning rate and nine predictions; returns the file."""
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(11, 5.5), layout='constrained')
    left, right = figure.subfigures(1, 2)
    top, bottom = left.subplots(2, 1)
    learn.recorder.plot_loss(ax=top)
    bottom.plot(learn.recorder.lrs)
    bottom.set(xlabel='batch', ylabel='learning rate')
    x, y = learn.dls.valid_ds[:9]
    learn.model.eval()
    with torch.no_grad():
        pred = learn.model(x).argmax(1)
    right.suptitle('predicted (true)')
    axs = right.subplots(3, 3)
    show_samples(x, [f'{p} ({t})' for p, t in zip(pred, y)], axs)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / 'minilearner_demo.png')
    return folder / 'minilearner_demo.png'

if __name__ == '__main__':
    demo()

"""Tests of minilearner.py, and a course: students rebuild it, lesson by lesson, guided by pytest.

    pytest                                          all tests; in a handout, what to do next
    pytest -k lesson03                              one lesson
    python test_minilearner.py handout DIR          write the course into DIR: minilearner.py with blanks,
                                                    and this file with the lessons and the guide alone
    python test_minilearner.py handout DIR all      with the electives; or lessons by number, functions by
                                                    name: handout DIR 4 5, handout DIR Learner.fit adam_step
    python test_minilearner.py run N                what lesson N was about, on MNIST-1D
    python test_minilearner.py grade FILE ... [--json]      points per lesson; the students' code is run
    python test_minilearner.py check [full]         can the lessons be solved in their order?

Lessons come first, then promises, then the guide. PyTorch and the plain loop are the oracles. No GPU is needed.
"""
import ast
import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import traceback
import types
import warnings
import weakref
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'Agg')      # draw without a screen
if sys.platform == 'linux':
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')   # processes talk within this machine

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

HANDED = None       # in a handout: the names of its exercises
PATIENCE = 20       # seconds for a test of a handout
N_CORE = 8          # lessons up to this one are the core, the others electives

NAME = Path(__file__).name
HERE = Path(__file__).resolve().parent
FILE = HERE / 'minilearner.py'      # the one beside this file, wherever we are
TESTS = Path(__file__).read_text(encoding='utf-8')
BLANK = re.compile(r'lesson (\d+): write ([\w.]+)')       # what a blank raises
IN_WORKER = 'PYTEST_XDIST_WORKER' in os.environ
sys.path.insert(0, str(HERE))
sys.modules.pop('minilearner', None)
sys.dont_write_bytecode = True      # a .pyc hides an edit of the same size within the same second

def import_library():
    """The module minilearner, or a short report of what would break the collection of all tests."""
    try:
        module = __import__('minilearner')
    except Exception as e:          # a half-typed line is part of learning, too
        frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).resolve() == FILE]
        what = ''.join(traceback.format_list(frames[-1:]) + traceback.format_exception_only(e))
        return None, f"minilearner.py cannot be imported; mend this first:\n{what}"
    lost = sorted(set(re.findall(r'\bml\.(\w+)', TESTS)) - set(dir(module)))
    what = f"minilearner.py has lost {', '.join(lost)}: was it renamed or deleted? The tests need the old name."
    return module, what if lost else ''

ml, broken = import_library()
if broken:
    if __name__ != '__main__':      # quiet: the report is all that there is to see
        pytest.exit(broken, returncode=1)
    sys.exit(broken)

torch.set_num_threads(1)            # for small tensors, one is the fastest
SOURCE = FILE.read_text(encoding='utf-8')
README = (HERE / 'README.md').read_text(encoding='utf-8') if (HERE / 'README.md').exists() else ''
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_readme = pytest.mark.skipif(not README, reason="README.md is not here")

# ---- lessons and promises

PARTS = []      # lessons, and sections of promises, in the order of this file
LESSONS = []

def lesson(n, title, goal, tried, minutes, predict, read, exercises):
    """Open lesson `n`: the tests below, up to the next part, check its `exercises`, {name: hint}.

    tried: minutes that an AI took as a student. minutes: what a person should plan, an estimate.
    """
    exercises = {k: v for k, v in exercises.items() if HANDED is None or k in HANDED}
    LESSONS.append(types.SimpleNamespace(n=n, title=title, goal=goal, tried=tried, minutes=minutes, predict=predict,
                                         read=read, exercises=exercises, line=sys._getframe(1).f_lineno))
    PARTS.append(LESSONS[-1])

def promises(title):
    """Open a section of promises: tests that are no lesson."""
    PARTS.append(types.SimpleNamespace(n=0, title=title, exercises={}, line=sys._getframe(1).f_lineno))

def lesson_of(function):
    """The lesson in which a test function stands, or its section of promises."""
    line = inspect.unwrap(function).__code__.co_firstlineno
    return [part for part in PARTS if part.line <= line][-1]

# the lesson from which on a Learner of a lesson has them
FIRST_IN = {'TrainEvalCallback': 3, 'Recorder': 4}

def callbacks_of(n):
    """The default callbacks that lesson `n` may use; all of them for promises."""
    return [cb for cb in ml.defaults.callbacks if not n or FIRST_IN.get(cb.__name__, math.inf) <= n]

@pytest.fixture(autouse=True)
def callbacks_of_the_lessons_so_far(request, monkeypatch):
    monkeypatch.setattr(ml.defaults, 'callbacks', callbacks_of(lesson_of(request.function).n))

@pytest.fixture(autouse=True)
def time_limit():
    """In a handout, a test that does not end is stopped, and says where it was."""
    can_stop = HANDED is not None and hasattr(signal, 'SIGPROF')
    if can_stop:        # by the time of the processor, as the machine may be busy
        signal.signal(signal.SIGPROF, stopped)
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    yield
    if can_stop:
        signal.setitimer(signal.ITIMER_PROF, 0)

def stopped(signum, frame):
    while frame and frame.f_code.co_filename != str(FILE):
        frame = frame.f_back
    where = f'{frame.f_code.co_name}, line {frame.f_lineno} of minilearner.py' if frame else 'the test itself'
    pytest.fail(f'stopped after {PATIENCE} seconds in {where}: does a loop there never end?', pytrace=False)

# -------------------------------------------------------------------- made-up data to train on

def line_data(n=64, seed=0):
    """Points on y = 2x + 3 with some noise: x and y of shape (n, 1)."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, generator=rng)
    return x, 2 * x + 3 + 0.1 * torch.randn(n, 1, generator=rng)

def line_dls(n_train=64, n_valid=24, bs=16, **kwargs):
    return ml.DataLoaders(ml.TensorLoader(*line_data(n_train), bs=bs),
                          ml.TensorLoader(*line_data(n_valid, 1), bs=bs),
                          **{'device': 'cpu', **kwargs})

class Line(nn.Module):
    """y = a * x + b, from a fixed start."""
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x): return self.a * x + self.b

def line_learner(dls=None, model=None, **kwargs):
    """A Learner on the line that prints nothing."""
    model = Line() if model is None else model      # a compiled module has no truth value
    learn = ml.Learner(dls or line_dls(), model, kwargs.pop('loss_func', F.mse_loss), **{'lr': 0.1, **kwargs})
    learn.logger = lambda row: None
    return learn

class TinyRNN(nn.Module):
    """Returns (output, raw activations, activations), and counts its resets."""
    def __init__(self):
        super().__init__()
        self.lin, self.n_reset = nn.Linear(2, 2), 0

    def reset(self): self.n_reset += 1

    def forward(self, x):
        h = self.lin(x)
        return h.sum((1, 2), keepdim=True)[:, 0], [h], [h]

# torch.manual_seed takes 3 ms to note the seed for GPUs, even where there are none
seed_cpu = torch.default_generator.manual_seed

def small_net(seed=0, n_in=10, n_out=3):
    seed_cpu(seed)
    return nn.Sequential(nn.Linear(n_in, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, n_out))

def class_batches(n_batches=4, bs=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs, 10, generator=rng), torch.randint(3, (bs,), generator=rng))
            for _ in range(n_batches)]

def assert_same_after_100_steps(nets, opts):
    for xb, yb in class_batches(100):
        for net, opt in zip(nets, opts):
            F.cross_entropy(net(xb.double()), yb).backward()
            opt.step()
            opt.zero_grad()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.allclose(a, b, rtol=1e-9) or pytest.fail(f"weights are up to {(a - b).abs().max():.1e} apart")

def mnist_mlp():
    """A network for MNIST-1D that trains in a second."""
    return nn.Sequential(nn.Flatten(), nn.Linear(40, 100), nn.ReLU(), nn.Linear(100, 10))

def assert_shown(rows):
    """What a lesson shows on MNIST-1D is as expected: rows of (what, value, low, high)."""
    for what, value, low, high in rows:
        assert low <= value <= high, what

def weights(model):
    return [p.detach().clone() for p in model.state_dict().values()]

def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))

class EventLog(ml.Callback):
    """Writes down every event."""
    order = 99

    def __init__(self):
        self.events = []

for _name in ml.EVENTS:
    setattr(EventLog, _name, lambda self, _name=_name: self.events.append(_name))

class RaiseAt(ml.Callback):
    """Raises `error` at the first `event` it sees in the phase `training`."""
    order = 100

    def __init__(self, event, error, training=None):
        self.wanted, self.error, self.in_training, self.done = event, error, training, False

    def see(self, name):
        right_phase = self.in_training is None or self.learn.training == self.in_training
        if name == self.wanted and right_phase and not self.done:
            self.done = True
            raise self.error

for _name in ml.EVENTS:
    setattr(RaiseAt, _name, lambda self, _name=_name: self.see(_name))

# ------------------------------------------------------- processes that run beside the tests

@pytest.fixture(scope='session')
def background():
    """Starts a command which gives way to the tests that run meanwhile; in the end, none is left."""
    processes = []

    def start(*command, cwd, nice=19, **env):
        def give_way():
            os.setpgrp()    # a group of its own, so that `kill_all` reaches all of it
            os.nice(nice)
        processes.append(subprocess.Popen(
            map(str, command), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, 'PYTHONPATH': str(HERE), 'OMP_NUM_THREADS': '1', **env},
            preexec_fn=give_way if hasattr(os, 'setpgrp') else None))
        return processes[-1]
    yield start
    for process in processes:
        kill_all(process)

@pytest.fixture(scope='session', autouse=True)
def started_early(request):
    """In the whole suite, they start before its first test: to start is what takes longest."""
    for name in ('killed', 'together_started', 'readme_started'):
        is_wanted = any(name in item.fixturenames for item in request.session.items)
        if is_wanted and HANDED is None and not IN_WORKER:
            request.getfixturevalue(name)

def kill_all(process):
    """End a process that leads a group of its own; torchrun, if it is asked, ends those that it has started."""
    for name in ('SIGTERM', 'SIGKILL'):
        if process.poll() is None:
            (os.killpg(process.pid, getattr(signal, name)) if hasattr(os, 'killpg') else process.kill())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)

def outcome(process, patience=150):
    """What the processes printed and how they ended; they must not wait for each other for ever."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise AssertionError("the processes wait for each other: do all of them gather?")
    blank = BLANK.search(err)
    if blank:
        raise NotImplementedError(blank[0])
    return types.SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)

# =============================================================================================
lesson(1, "A first loop", tried=3, minutes=30,
       goal="train a network without any framework, on batches that you cut yourself",
       predict="what happens to the training if `opt.zero_grad()` is missing, or `model.eval()`?",
       read="sections 1 and 6",
       exercises={
           'fit_plain': "train(): loss, backward, step, zero_grad per batch; then eval(), no_grad(): loss times rows",
           'TensorLoader.__iter__': "an order of the rows (torch.randperm or arange), cut by .split; len(self) batches",
           'DataLoaders.split_batch': "`split`, tuplify; else tuples, lists by n_inp, dicts by targets; else one input",
           'map_tensors': "it calls itself on items of tuples, lists, dicts, on fields; type(b), copy.copy keep types"})

def test_plain_loop_is_gradient_descent():
    model, batch = Line(), (torch.tensor([[2.]]), torch.tensor([[1.]]))
    ml.fit_plain(model, [batch], [batch], F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), 1)
    # pred = 0.5 * 2 - 0.5 = 0.5; loss = (0.5 - 1)**2; dloss/dpred = -1; da = -2, db = -1
    assert model.a.item() == pytest.approx(0.5 + 0.2), "a -= lr * da"
    assert model.b.item() == pytest.approx(-0.5 + 0.1), "b -= lr * db"
    assert model.a.grad is None, "zero_grad ends every step: old gradients must not add up"

def test_plain_loop_weighs_a_small_last_batch_rightly():
    model, (x, y) = Line(), line_data(10)
    opt = torch.optim.SGD(model.parameters(), 0.)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    losses = ml.fit_plain(model, batches, batches, F.mse_loss, opt, 2)
    assert losses == pytest.approx([F.mse_loss(model(x), y).item()] * 2), \
        "2 rows of 10 are a fifth of the mean, not a half"
    assert not model.training, "after validation the model is in evaluation mode"

def test_plain_loop_puts_the_model_into_the_right_mode_each_time():
    seen, model, batch = [], Line(), line_data(4)
    model.register_forward_hook(lambda model, *args: seen.append((model.training, torch.is_grad_enabled())))
    ml.fit_plain(model, [batch, batch], [batch], F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), 2)
    assert [training for training, _ in seen] == [True, True, False] * 2, \
        "model.train(), model.eval(): dropout and batch norm work in another way in each"
    assert [graph for _, graph in seen] == [True, True, False] * 2, \
        "without torch.no_grad(), validation would keep a graph for nothing"

def test_tensor_loader_cuts_batches():
    x, y = torch.arange(10), torch.arange(10) * 2
    batches = list(ml.TensorLoader(x, y, bs=4))
    assert [b[0].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], "in order, the last may be smaller"
    assert all(isinstance(b, tuple) and b[1].equal(b[0] * 2) for b in batches), "tuples, of the same rows of each"
    assert [len(b[0]) for b in ml.TensorLoader(x, bs=4, drop_last=True)] == [4, 4], "drop_last drops a smaller batch"

def test_tensor_loader_shuffles_anew_each_time():
    loader = ml.TensorLoader(torch.arange(50), torch.arange(50), bs=20, shuffle=True)
    torch.manual_seed(0)
    first, second = (torch.cat([b[0] for b in loader]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(50)), "each row comes once"
    assert first != second and first != sorted(first), "in a new order in each epoch"
    assert all(b[0].equal(b[1]) for b in loader), "inputs and targets stay together"
    torch.manual_seed(0)
    assert torch.cat([b[0] for b in loader]).tolist() == first, "the same seed gives the same order"

def test_split_batch_makes_two_tuples():
    dls = ml.DataLoaders([0], device='cpu')
    x, y, z = torch.ones(1), torch.zeros(1), torch.full((1,), 2.)
    assert dls.split_batch((x, y)) == ((x,), (y,)) and dls.split_batch([x, y]) == ((x,), (y,)), "of tuples and lists"
    assert dls.split_batch((x, y, z)) == ((x, y), (z,)), "all but the last are inputs"
    assert dls.split_batch((x,)) == ((x,), ()) and dls.split_batch(x) == ((x,), ()), "without a target, yb is empty"
    dls.n_inp = 1
    assert dls.split_batch((x, y, z)) == ((x,), (y, z)), "n_inp says how many are inputs"

def test_split_batch_of_dicts_and_by_a_function():
    batch = {'ids': 1, 'mask': 2, 'labels': 3}
    dls = ml.DataLoaders([0], device='cpu', targets='labels')
    (inputs,), targets = dls.split_batch(batch)
    assert isinstance(inputs, ml.Keywords) and inputs == {'ids': 1, 'mask': 2} and targets == (3,), \
        "the model gets what is no target, as keywords"
    assert dls.split_batch({'ids': 1})[1] == (), "a batch without targets, as for predictions"
    with pytest.raises(TypeError, match='targets='):
        ml.DataLoaders([0], device='cpu').split_batch(batch)
    dls = ml.DataLoaders([0], device='cpu', split=lambda b: (b['ids'], (b['labels'],)))
    assert dls.split_batch(batch) == ((1,), (3,)), "`split` is asked first, and need not make tuples"

def test_map_tensors_keeps_the_structure():
    Pair = collections.namedtuple('Pair', 'a b')
    one = torch.ones(2)
    found = ml.map_tensors(lambda t: t + 1, {'x': [one, (one, 'text')], 'y': Pair(one, 3)})
    assert found['x'][0].equal(one + 1) and found['x'][1][0].equal(one + 1), "tensors at any depth"
    assert found['x'][1][1] == 'text' and found['y'].b == 3, "what is no tensor stays as it is"
    assert isinstance(found['x'], list) and isinstance(found['x'][1], tuple) and isinstance(found['y'], Pair), \
        "lists stay lists, tuples tuples, named tuples named"
    assert ml.map_tensors(lambda t: t + 1, one).equal(one + 1) and one.equal(torch.ones(2)), "the original is untouched"

def test_map_tensors_keeps_the_type_of_mappings_and_dataclasses():
    batch = collections.OrderedDict(a=torch.ones(1))
    assert type(ml.map_tensors(torch.neg, batch)) is collections.OrderedDict and batch['a'] == 1
    user = ml.map_tensors(torch.neg, collections.UserDict(a=torch.ones(1)))
    assert type(user) is collections.UserDict and user['a'] == -1
    Output = dataclasses.make_dataclass('Output', ['logits'], frozen=True)
    assert ml.map_tensors(torch.neg, Output(torch.ones(1))) == Output(torch.tensor([-1.]))

def run_1():
    (x, y), (x_test, y_test) = ml.mnist1d()
    seed_cpu(0)
    model = mnist_mlp()
    train, valid = ml.TensorLoader(x, y, bs=64, shuffle=True), ml.TensorLoader(x_test, y_test, bs=250)
    losses = ml.fit_plain(model, train, valid, F.cross_entropy, torch.optim.Adam(model.parameters(), 3e-3), 5)
    yield "validation loss after 1 epoch of 5", losses[0], 1.6, 2.1
    yield "validation loss after 5 epochs", losses[-1], 1.0, 1.5
    with torch.no_grad():
        yield "accuracy", (model(x_test).argmax(1) == y_test).float().mean().item(), 0.4, 0.65

def test_what_lesson_1_shows_on_mnist1d():
    assert_shown(run_1())

# =============================================================================================
lesson(2, "Callbacks", tried=2, minutes=45,
       goal="objects with methods for events, which read from the learner as from themselves",
       predict="in a callback, `self.loss` is the learner's loss; what does `self.loss = 0` change?",
       read="section 2",
       exercises={
           'Callback.__call__': "`defines` tells what it has; BATCH_EVENTS are those of batches; no learner: training",
           'Callback.__getattr__': "Python calls it for what it found nowhere else; refuse events, and names with __",
           'must_precede': "run_before and run_after hold one class, or several: listify, then isinstance",
           'Learner.ordered_cbs': "sort by order; again and again take the first that none of the others must precede"})

def test_a_call_runs_the_method_of_that_name():
    class Greet(ml.Callback):
        def before_fit(self): return 'hello'
    cb = Greet(after_fit=lambda self: f'bye from {self.name}')
    assert cb('before_fit') == 'hello', "a call returns what the method returns"
    assert cb('after_fit') == 'bye from greet', "the method may also be one of this object alone"
    assert cb('after_loss') is None, "it has no such method: nothing happens"

def heard(cb):
    """Those of five events, from the outermost to the innermost, for which a callback does something."""
    names = ['before_fit', 'before_epoch', 'after_train', 'before_batch', 'after_batch']
    for name in names:
        setattr(cb, name, lambda: 'heard')
    return [name for name in names if cb(name)]

def test_flags_say_when_a_callback_runs():
    outside, batch = ['before_fit', 'before_epoch', 'after_train'], ['before_batch', 'after_batch']
    cb = ml.Callback()
    assert heard(cb) == outside + batch, "it runs unless a flag forbids it"
    cb.run_valid = False
    assert heard(cb) == outside + batch, "without a learner, it is in training: run_valid plays no part"
    cb.learn = types.SimpleNamespace(training=False)
    assert heard(cb) == outside, "run_valid=False: it skips the batches of validation, and nothing else"
    cb.learn.training = True
    assert heard(cb) == outside + batch, "but not those of training"
    cb.run_train = False
    assert heard(cb) == outside, "run_train=False: it skips the batches of training"
    cb.run_train, cb.run = True, False
    assert heard(cb) == [], "run=False: it skips all"

def test_what_a_callback_lacks_is_looked_up_in_its_learner():
    cb = ml.Callback()
    cb.learn = types.SimpleNamespace(loss=2.5, before_fit=print, __len__=3)
    assert cb.loss == 2.5, "self.loss is self.learn.loss"
    with pytest.raises(AttributeError):
        cb.lost
    assert not hasattr(cb, 'before_fit'), "events never: the model of a learner may have a method of that name"
    assert not hasattr(cb, '__len__'), "nor what Python asks for itself, when it copies or prints"
    with pytest.raises(AttributeError):
        ml.Callback().loss      # it has no learner

def test_a_callback_may_have_to_precede_another():
    class Clip(ml.Callback): pass
    class Scale(ml.Callback): run_before = Clip
    class Log(ml.Callback): run_after = [Clip, Scale]
    clip, scale, log = Clip(), Scale(), Log()
    assert ml.must_precede(scale, clip) and not ml.must_precede(clip, scale), "Scale wants to run before Clip"
    assert ml.must_precede(scale, log) and ml.must_precede(clip, log), "Log wants to run after both"
    assert not ml.must_precede(log, clip) and not ml.must_precede(clip, Clip()), "nobody said so"
    Scale.run_before = [ml.Callback]
    assert ml.must_precede(scale, clip), "what is derived from a class is of this class, too"
    assert not ml.must_precede(scale, scale), "nobody precedes itself"

def test_callbacks_run_in_order():
    class First(ml.Callback):
        order = 2
        def before_fit(self): pass
    class Second(First): order = 1
    class Third(First): order = 1
    a, b, c = First(), Second(), Third()
    def ordered(*cbs): return line_learner(cbs=cbs).ordered_cbs('before_fit')
    assert ordered(a, c, ml.Callback(), b) == [c, b, a], \
        "lower orders first; equal ones stay as they were added; those without the event are left out"
    Second.run_before = Third
    assert ordered(c, b, a) == [b, c, a], "run_before is stronger than order"
    Second.run_before, Third.run_after = (), First
    assert ordered(c, b, a) == [b, a, c], "so is run_after: Third waits for First, although its order is lower"
    First.run_after = Third
    with pytest.raises(ValueError):
        ordered(a, c)       # each waits for the other; a loop that goes on would never end

def test_a_learner_fires_events_at_its_callbacks():
    class Double(ml.Callback):
        def after_loss(self): self.learn.loss = self.loss * 2
    learn = line_learner(cbs=[Double, Double()])
    learn.loss = torch.tensor(3.)
    learn(['before_fit', 'after_loss'])
    assert learn.loss == 12, "self.learn.loss = ... changes the loss of the learner, for the next one to read"

class Clip(ml.Callback):
    def before_step(self): nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

def run_2():
    (x, y), (x_test, y_test) = ml.mnist1d()
    for what, cbs, low, high in [("accuracy at too large a rate: weights explode", [], 0., 0.35),
                                 ("the same with Clip, a callback of one line", [Clip], 0.45, 0.7)]:
        seed_cpu(0)
        model = mnist_mlp()
        dls = ml.DataLoaders(ml.TensorLoader(x, y, bs=64, shuffle=True), device='cpu')
        learn = ml.Learner(dls, model, F.cross_entropy, cbs=cbs, default_cbs=False)
        opt = torch.optim.SGD(model.parameters(), 4.)
        for epoch in range(10):     # the loop of lesson 1, with two places at which callbacks may step in
            for learn.xb, learn.yb in map(dls.split_batch, dls.train):
                learn('before_batch')
                F.cross_entropy(model(*learn.xb), *learn.yb).backward()
                learn('before_step')
                opt.step()
                opt.zero_grad()
        yield what, (model(x_test).argmax(1) == y_test).float().mean().item(), low, high

def test_what_lesson_2_shows_on_mnist1d():
    assert_shown(run_2())

# =============================================================================================
lesson(3, "The loop", tried=7, minutes=120,
       goal="the loop of lesson 1 again, with a place before and after each of its parts for the code of others",
       predict="which events follow if a callback raises CancelBatchException in after_pred? And a ValueError?",
       read="section 3, up to ensure_opt, and TrainEvalCallback at its end; have fit_plain beside it",
       exercises={
           'Learner._stage': "self._fire before_X in try; except cancel; finally: completed, failed, then after_X",
           'Learner.all_batches': "enumerate self.dl; n_iter for all to see: length_hint(dl) is 0 if dl has no length",
           'Learner.one_batch': "to_device(b, dls.device), dls.split_batch, the stage 'batch'; note: where(self)",
           'Learner._one_batch': "call_model makes pred; a loss only if there is a yb; learn only if self.training",
           'Learner._train_step': "loss_grad is loss, unless a callback scales it; two stages; then opt.zero_grad()",
           'Learner._one_epoch': "self.dl is that of the pass; stages 'train' and, in torch.no_grad(), 'validate'",
           'Learner._all_epochs': "from start_epoch to n_epoch, which fit sets; `for self.epoch in ...` is allowed",
           'Learner.fit': "check the epochs; added_cbs; ensure_opt; set lr, wd; zero_grad; stage 'fit', _forget_batch; "
                          "`finally`: the wd that was there, training False, dl None, each cb.run True",
           'TrainEvalCallback.before_train': "not train_bn: frozen NORM_LAYERS in eval(); learn.training, pct_train",
           'TrainEvalCallback.after_batch': "one batch more of n_iter * n_epoch; set them on self.learn"})

BATCH = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
         'before_step', 'after_step', 'after_batch']
FIT = ['before_fit', 'before_epoch', 'before_train', *BATCH, *BATCH, 'after_train',
       'before_validate', 'before_batch', 'after_pred', 'after_loss', 'after_batch',
       'after_validate', 'after_epoch', 'after_fit']

def two_batch_learner(cbs=None, **kwargs):
    """Two batches train, one validates."""
    dls = ml.DataLoaders([line_data(4)] * 2, [line_data(4)], device='cpu')
    return line_learner(dls, cbs=cbs, **{'opt_func': torch.optim.SGD, **kwargs})

def staged(body=int, **handlers):
    """What `_stage` fires around `body`; `handlers` are functions for events."""
    fired = []
    def fire(name, error=None):
        fired.append(name)
        handlers.get(name, int)()
    try:
        ml.Learner._stage(types.SimpleNamespace(_fire=fire), 'batch', lambda: (fired.append('body'), body()),
                          ml.CancelBatchException)
    except (ml.CancelException, ArithmeticError) as e:      # not what a blank raises
        fired.append(type(e).__name__)
    return fired

def raising(error):
    """A function, handler or body of a stage, that raises `error`."""
    def f(*args): raise error
    return f

def test_a_stage_announces_a_part_and_ends_it_whatever_is_raised():
    assert staged() == ['before_batch', 'body', 'after_batch'], "before, the part, after"
    cancel = raising(ml.CancelBatchException)
    assert staged(cancel) == ['before_batch', 'body', 'after_cancel_batch', 'after_batch'], \
        "its own Cancel exception ends the part early, and goes no further"
    assert staged(before_batch=cancel) == ['before_batch', 'after_cancel_batch', 'after_batch'], \
        "it may come in before_batch, too: then the part is skipped"
    for kind in (ml.CancelFitException, ZeroDivisionError):
        assert staged(raising(kind)) == ['before_batch', 'body', 'after_batch', kind.__name__], \
            "an error, or the Cancel of a larger part, goes on, but after_batch comes first"

def test_all_batches_of_a_loader_are_processed():
    seen = []
    class Spy(ml.Learner):
        def one_batch(self, i, b): seen.append((i, b, self.n_iter))
    learn = Spy(line_dls(), Line(), F.mse_loss)
    learn.dl = ['a', 'b']
    learn.all_batches()
    learn.dl = (b for b in 'c')
    learn.all_batches()
    assert seen == [(0, 'a', 2), (1, 'b', 2), (0, 'c', 0)], "number, batch, how many there are (0: unknown)"

def test_one_batch_predicts_and_compares():
    log, (x, y) = EventLog(), line_data(4)
    learn = line_learner(cbs=log)
    learn.one_batch(5, (x, y))
    assert learn.iter == 5 and learn.x is x and learn.y is y, "everybody can see number, inputs and targets"
    assert learn.xb == (x,) and learn.yb == (y,), "xb and yb are tuples, as split_batch makes them"
    assert learn.pred.equal(learn.model(x)) and learn.loss.equal(F.mse_loss(learn.pred, y)), "as in fit_plain"
    assert log.events[1:] == ['before_batch', 'after_pred', 'after_loss', 'after_batch'], "and nothing is trained"
    assert learn.model.a.grad is None, "for `training` is False"
    learn.one_batch(0, x)
    assert log.events[5:] == ['before_batch', 'after_pred', 'after_batch'], "without targets, it only predicts"
    learn.dls.device = torch.device('meta')
    learn.one_batch(0, (x, y))
    assert learn.x.is_meta and learn.y.is_meta, "batches go to the device of dls"

def test_each_part_goes_on_with_what_the_callbacks_have_left():
    grads, losses = [], []
    class Change(ml.Callback):
        def before_batch(self): self.learn.xb, self.learn.yb = (self.x * 0,), (self.y * 0 + 4,)
        def after_pred(self): self.learn.pred = self.pred + 1
        def after_loss(self): self.learn.loss = self.loss + 100 * self.model.a      # a penalty
        def before_backward(self): self.learn.loss_grad = self.loss_grad * 10
        def after_backward(self): grads.append((self.a.grad.item(), self.b.grad.item()))
        def after_batch(self): losses.append(self.loss.item())
    two_batch_learner(Change, lr=1e-3).fit(1)
    pred = 0.5 * 0 - 0.5 + 1
    assert losses[0] == pytest.approx((pred - 4)**2 + 100 * 0.5), "in learn.xb, learn.pred and learn.loss"
    assert grads[0] == pytest.approx((10 * 100, 10 * 2 * (pred - 4))), \
        "backward starts from loss_grad as it is after before_backward; the loss to report stays"

def test_events_come_in_the_documented_order():
    log = EventLog()
    two_batch_learner(log).fit(1)
    assert log.events[1:] == FIT, "each part is announced and ended"

@pytest.mark.parametrize('momentum', [0, 0.9])
def test_learner_equals_the_plain_loop_bit_for_bit(momentum):
    batches, valid = class_batches(), class_batches(2, seed=9)
    plain, model = small_net(), small_net()
    opt = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum)
    ml.fit_plain(plain, batches, valid, F.cross_entropy, opt, 3)
    learn = line_learner(ml.DataLoaders(batches, valid, device='cpu'), model, loss_func=F.cross_entropy,
                         opt_func=functools.partial(torch.optim.SGD, momentum=momentum))
    learn.fit(1)
    learn.fit(2)
    same(weights(plain), weights(model)) or pytest.fail("other weights or norm statistics than fit_plain: compare "
                                                        "backward, step and zero_grad, model.train(), and the loaders")

def test_validation_does_not_train():
    seen = []
    see = ml.Callback(after_pred=lambda self: seen.append((self.training, self.model.training, self.pred.requires_grad,
                                                           self.dl is self.dls.train, self.n_iter)))
    learn = two_batch_learner(see)
    learn.fit(1)
    assert seen == [(True, True, True, True, 2)] * 2 + [(False, False, False, False, 1)], \
        "in evaluation mode, without a graph, on the other loader"
    learn.dls.valid, seen[:] = None, []
    learn.fit(1)
    assert len(seen) == 2, "without a validation loader, nothing is validated"

class Stream:
    """A loader that does not tell its length."""
    def __iter__(self): return iter([line_data(4)] * 2)

def test_progress_is_counted():
    seen = []
    see = ml.Callback(before_batch=lambda self: seen.append((self.epoch, self.train_iter, self.pct_train)))
    see.run_valid = False
    learn = two_batch_learner(see)
    learn.fit(2)
    assert seen == [(0, 0, 0), (0, 1, 0.25), (1, 2, 0.5), (1, 3, 0.75)] and learn.pct_train == 1, \
        "train_iter counts all batches of training, pct_train is their share of the fit"
    seen.clear()
    learn.fit(4, start_epoch=3)
    assert seen == [(3, 0, 0.75), (3, 1, 0.875)], "the epochs left out count as done"
    seen.clear()
    learn.dls.train = Stream()
    learn.fit(2)
    assert seen == [(0, 0, 0), (0, 1, 0), (1, 2, 0.5), (1, 3, 0.5)], "of unknown length: it waits for the next epoch"

def test_frozen_norm_layers_rest_without_train_bn():
    def modes(**kwargs):
        block, head = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.BatchNorm1d(4)
        block.requires_grad_(False)
        learn = two_batch_learner(model=nn.Sequential(block, head, nn.Linear(4, 1)), **kwargs)
        learn('before_train')
        return [m.training for m in (*block[1:], head)]
    assert modes() == [True, True, True], "norm layers train, even if they are frozen"
    assert modes(train_bn=False) == [False, True, True], "unless train_bn is False; dropout and the others go on"

@pytest.mark.parametrize('part, at, then', [
    ('Step', 'before_step', 'after_cancel_step after_step after_batch'),
    ('Backward', 'before_backward', 'after_cancel_backward after_backward before_step'),
    ('Batch', 'after_pred', 'after_cancel_batch after_batch before_batch'),
    ('Train', 'after_batch', 'after_cancel_train after_train before_validate'),
    ('Valid', 'before_validate', 'after_cancel_validate after_validate after_epoch'),
    ('Epoch', 'before_train', 'after_train after_cancel_epoch after_epoch before_epoch'),
    ('Fit', 'after_loss', 'after_batch after_train after_epoch after_cancel_fit after_fit')])
def test_each_cancel_exception_ends_its_own_part(part, at, then):
    log, raiser = EventLog(), RaiseAt(at, getattr(ml, f'Cancel{part}Exception')())
    two_batch_learner([log, raiser]).fit(2)
    after = log.events[log.events.index(at) + 1:]
    assert after[:len(then.split())] == then.split(), "that part is cancelled; all parts that have begun end"

def test_an_error_goes_on_and_says_where_it_came_from():
    class Fails(Line):
        def forward(self, x):
            if not self.training: raise ZeroDivisionError
            return super().forward(x)
    learn = two_batch_learner(model=Fails())
    with pytest.raises(ZeroDivisionError) as info:
        learn.fit(1)
    assert ml.where(learn) in info.value.__notes__, "one_batch adds a note: epoch, batch, shapes"
    assert learn.x is not None, "the batch stays for the debugger"

@pytest.mark.parametrize('error', [ZeroDivisionError, ml.CancelFitException])
def test_after_a_fit_all_is_at_rest_however_it_ended(error):
    cb = ml.Callback(after_backward=raising(error))
    off = ml.Callback(before_fit=lambda self: setattr(self, 'run', False))
    learn = two_batch_learner()
    with contextlib.suppress(ZeroDivisionError):
        learn.fit(1, cbs=[cb, off])
    assert len(learn.cbs) == 1 and off.learn is None, "callbacks of the fit leave with it"
    assert not learn.training, "it trains no more"
    off.run = False
    learn.add_cb(off).fit(1)
    fresh = two_batch_learner()
    fresh.fit(1)
    assert same(weights(learn.model), weights(fresh.model)), "gradients of a broken batch must not add to the next ones"
    assert off.run, "the end of the fit sets `run` of each callback back to True"
    assert learn.x is None and learn.pred is None and learn.loss is None, "_forget_batch frees its memory"

def test_fit_sets_rate_and_weight_decay_of_its_optimizer():
    seen = []
    see = ml.Callback(before_fit=lambda self: seen.append([self.opt.hypers[0][k] for k in ('lr', 'wd')]))
    learn = two_batch_learner(see, lr=0.5, opt_func=functools.partial(torch.optim.SGD, weight_decay=0.1))
    for kwargs in ({}, {'lr': 0.25, 'wd': 0.}, {}):
        learn.fit(1, **kwargs)
    learn.wd = 0.2
    learn.fit(1)
    first = learn.opt
    learn.fit(1, wd=0.3)
    assert learn.opt is first, "a second fit goes on with what the optimizer remembers"
    learn.fit(0, reset_opt=True)
    assert learn.opt is not first, "unless reset_opt asks for a new one"
    assert seen[:5] == [[0.5, 0.1], [0.25, 0.], [0.5, 0.1], [0.5, 0.2], [0.5, 0.3]], \
        "those of the fit, else the learner's, else the optimizer's own wd; 0 is a value, not 'none given'"

@pytest.mark.parametrize('bad', [{'n_epoch': -1}, {'n_epoch': '3'}, {'n_epoch': 1.5}, {'n_epoch': 1, 'start_epoch': 2},
                                 {'n_epoch': 1, 'start_epoch': -1}])
def test_fit_checks_its_epochs_before_it_begins(bad):
    learn = two_batch_learner()
    with pytest.raises(ValueError):     # by `check`, as everywhere
        learn.fit(**bad)
    learn.fit(0)
    learn.fit(1, start_epoch=1)
    assert same(weights(learn.model), weights(Line())), "none of these trains; to train for 0 epochs is allowed"

def run_3():
    train, (x, y) = ml.mnist1d()
    def made():
        seed_cpu(0)
        model = mnist_mlp()
        return model, ml.TensorLoader(*train, bs=64, shuffle=True)
    plain, loader = made()
    losses = ml.fit_plain(plain, loader, [(x, y)], F.cross_entropy, torch.optim.Adam(plain.parameters(), 3e-3), 8)
    model, loader = made()
    learn = ml.Learner(ml.DataLoaders(loader, [(x, y)], device='cpu'), model, F.cross_entropy,
                       opt_func=torch.optim.Adam, cbs=ml.TrainEvalCallback, default_cbs=False)
    learn.fit(8, lr=3e-3)
    yield "validation loss with fit_plain", losses[-1], 0.9, 1.4
    yield "validation loss with Learner.fit", F.cross_entropy(model(x), y).item(), 0.9, 1.4
    yield "accuracy", (model(x).argmax(1) == y).float().mean().item(), 0.45, 0.75
    yield "largest difference between their weights", max((a - b).abs().max().item() for a, b in zip(
        weights(plain), weights(model))), 0., 0.

def test_what_lesson_3_shows_on_mnist1d():
    assert_shown(run_3())

# =============================================================================================
lesson(4, "Measure and record", tried=4, minutes=50,
       goal="know how well a training goes: exact means over all samples, and a history of every batch and epoch",
       predict="24 validation rows in batches of 16 and 8: is the mean of the two batches' accuracies the accuracy?",
       read="sections 4 and 5",
       exercises={
           'accuracy': "argmax along `axis` finds a class for each position; first look whether the shapes agree",
           'AvgMetric.accumulate': "`add` wants the mean over the batch, and how many samples it is of: n_rows",
           'AvgSmoothLoss.accumulate': "back from the newest, weights are 1, beta, beta**2, ...: what is its share?",
           'Recorder.after_batch': "metrics accumulate; if one raises, add_note(its name); losses, lrs in training",
           'Recorder.after_epoch': "take self.row, leave []; all None: return; iters, values, final_record; logger"})

def test_accuracy_is_the_share_of_right_answers():
    pred = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    target = torch.tensor([0, 1, 1, 0])
    assert ml.accuracy(pred, target).item() == 0.75, "the largest score of a row is the answer: 3 of 4 are right"
    assert ml.accuracy(pred.T, target, axis=0).item() == 0.75, "axis holds the classes: here each column is a sample"
    assert ml.accuracy(pred, target[:, None]).item() == 0.75, "targets (B, 1) == answers (B,) would be a (B, B) table"
    steps = F.one_hot(torch.tensor([[0, 1, 2], [1, 1, 0]]), 4)      # (B, time, C): every time step is a sample
    target = torch.tensor([[0, 1, 2], [1, 1, 2]])
    assert ml.accuracy(steps, target).item() == ml.accuracy(steps, target[..., None]).item() == pytest.approx(5 / 6)
    assert ml.accuracy(pred[:1], torch.tensor([0])).item() == 1, "a batch may have a single sample"

def test_accuracy_refuses_shapes_that_cannot_be_compared():
    pred, target = torch.rand(4, 2), torch.tensor([0, 1, 1, 0])
    for bad in ((pred[:, :1], target), (pred, target[:1]), (torch.rand(2, 5, 3), torch.ones(5, 2))):
        with pytest.raises(ValueError):
            ml.accuracy(*bad)   # of a single score, number 0 is always the largest; other shapes would broadcast

def measured(pred, *yb, loss=None):
    """What a metric sees: a learner in the middle of a batch."""
    return types.SimpleNamespace(pred=pred, yb=yb, loss=loss)

def test_a_mean_over_batches_is_that_of_all_samples():
    pred, target = torch.randn(10, 2), torch.randn(10, 2)
    metric = ml.AvgMetric(F.l1_loss)
    for at in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]):
        metric.accumulate(measured(pred[at], target[at]))
    assert metric.value.item() == pytest.approx(F.l1_loss(pred, target).item()) and metric.count == 10, \
        "the last batch has 2 samples of 10, so it weighs a fifth, not a third: count samples, not batches"

def test_a_metric_gets_all_targets_and_keeps_no_graph():
    metric, pred = ml.AvgMetric(lambda pred, y, z: (pred - y * z).mean()), torch.ones(4, requires_grad=True)
    metric.accumulate(measured(pred, torch.full((4,), 2.), torch.full((4,), 3.)))
    assert metric.value.item() == -5, "called as func(pred, *yb)"
    assert not metric.total.requires_grad, "or the graphs of all batches would stay in memory"

def test_the_smoothed_loss_is_a_debiased_average():
    losses, metric, avg = [3., 1., 2., 4.], ml.AvgSmoothLoss(beta=0.9), 0.
    for i, loss in enumerate(losses, 1):
        metric.accumulate(measured(None, torch.ones(2), loss=torch.tensor(loss)))
        avg = 0.9 * avg + 0.1 * loss
        assert metric.value.item() == pytest.approx(avg / (1 - 0.9**i)), "avg began at 0: debiased, it is not too small"
    metric.reset()
    metric.accumulate(measured(None, torch.ones(2), loss=torch.tensor([1., 6.], requires_grad=True)))
    assert metric.value.item() == 3.5 and not metric.value.requires_grad, \
        "after a reset it begins anew; of a loss for each sample the mean counts, and no graph is kept: batch_loss"

def in_training(**kwargs):
    """A learner at the beginning of its first training pass."""
    learn = line_learner(opt_func=torch.optim.SGD, **kwargs)
    learn.ensure_opt()
    learn(['before_fit', 'before_epoch', 'before_train'])
    return learn

def test_each_training_batch_is_recorded():
    learn, smooth = in_training(), ml.AvgSmoothLoss()
    for i, batch in enumerate(learn.dls.train):
        learn.one_batch(i, batch)
        smooth.accumulate(learn)
        assert learn.recorder.losses[i].item() == pytest.approx(smooth.value.item()), "smoothed, after each batch"
        assert learn.smooth_loss is learn.recorder.losses[-1], "losses: smoothed; learn.smooth_loss is the newest"
    assert learn.recorder.lrs == [0.1] * 4, "and the rate of the optimizer"
    learn.one_batch(4, line_data(4)[:1])
    assert len(learn.recorder.losses) == 4, "without a target, `yb` is empty, and the loss that of the batch before"
    learn = in_training(splitter=lambda model: [[model.a], [model.b]])
    learn.opt.set_hyper('lr', [0.01, 0.02])
    learn.one_batch(0, line_data(4))
    assert learn.recorder.lrs == [0.02], "of several groups, that of the last one"

def test_a_metric_that_raises_is_named():
    def fragile(pred, target): raise ZeroDivisionError
    learn = in_training(metrics=fragile)
    learn('before_validate')
    with pytest.raises(ZeroDivisionError) as info:
        learn.one_batch(0, line_data(4))
    assert 'fragile' in ''.join(info.value.__notes__), "which metric it was: error.add_note(...), then raise the same"

def test_each_epoch_makes_a_row():
    rows, learn = [], line_learner(opt_func=torch.optim.SGD, metrics=F.l1_loss)
    learn.logger = rows.append
    learn.fit(3)
    rec = learn.recorder
    assert rec.iters == [4, 8, 12], "how many losses there are at each epoch's end; those of validation are not kept"
    assert learn.final_record == rec.values[-1], "values has all rows, final_record is the last"
    assert rec.values[-1][0] == pytest.approx(rec.losses[-1].item()), "first train_loss, as smoothed at its end"
    x, y = line_data(24, 1)
    exact = [f(learn.model(x), y).item() for f in (F.mse_loss, F.l1_loss)]
    assert rec.values[-1][1:] == pytest.approx(exact), "then what valid_mets found: exact over batches of 16 and 8"
    assert [row[:-1] for row in rows] == [[i, *rec.values[i]] for i in range(3)], "for the logger, first the epoch"
    assert re.fullmatch(r'00:0\d', rows[-1][-1]), "at last the time since self.start, as mm:ss"
    assert rec.log == rows[-1], "the newest one is kept as `log`"
    rec.add_time = False
    learn.fit(1)
    assert rec.log == [0, *learn.final_record], "unless add_time is False"

def test_a_skipped_epoch_has_no_row():
    class Skip(ml.Callback):        # its order is 0, so that it comes before the Recorder
        def before_epoch(self):
            if self.epoch == 1: raise ml.CancelEpochException
    rows, learn = [], line_learner(opt_func=torch.optim.SGD, cbs=Skip)
    learn.logger = rows.append
    learn.fit(3)
    assert [row[0] for row in rows] == [0, 2] and len(learn.recorder.values) == 2, \
        "it must not show the row of epoch 0 again: begin with an empty self.row, and return if all is None"

def run_4():
    train, test = ml.mnist1d()
    seed_cpu(0)
    dls = ml.DataLoaders.from_tensors(*train, valid=test, device='cpu')
    model = mnist_mlp()
    learn = ml.Learner(dls, model, F.cross_entropy, torch.optim.Adam, lr=3e-3, metrics=ml.accuracy)
    learn.fit(5)
    yield "training loss, smoothed", learn.final_record[0], 0.9, 1.7
    yield "accuracy after 1 epoch of 5", learn.recorder.values[0][-1], 0.15, 0.45
    yield "accuracy after 5 epochs", learn.final_record[-1], 0.4, 0.65
    exact = F.cross_entropy(model(test[0]), test[1]).item()
    yield "validation loss minus that of one pass", learn.final_record[1] - exact, -1e-5, 1e-5

def test_what_lesson_4_shows_on_mnist1d():
    assert_shown(run_4())

# =============================================================================================
lesson(5, "SGD, from steps", tried=3, minutes=45,
       goal="write the steps of which SGD is made; it must move weights exactly as torch.optim.SGD does",
       predict="the gradient stays the same for ever: how many times longer does momentum 0.9 make each step?",
       read="section 7",
       exercises={
           'sgd_step': "p.data.add_(g, alpha=-lr) changes p in place",
           'weight_decay': "multiply p.data in place; if do_wd is False, do nothing",
           'l2_reg': "as weight_decay, but it is the gradient that changes, and lr plays no part",
           'average_grad': "begin with zeros, return {'grad_avg': ...}; dampened, the gradient counts by 1 - mom",
           'momentum_step': "as sgd_step, with the average for the gradient",
           'Optimizer.step': "all_params(with_grad=True) lists what steps, run_step calls one, state.update keeps"})

def param(value=(1., 2.), grad=(0.5, -1.)):
    """A parameter that has a gradient."""
    p = nn.Parameter(torch.tensor(value))
    p.grad = torch.tensor(grad)
    return p

def close(t, values):
    return torch.allclose(t, torch.tensor(values))

@torch.no_grad()        # as Optimizer.step calls them
def test_sgd_step_goes_down_the_gradient():
    p = param()
    ml.sgd_step(p, lr=0.1, wd=3)
    assert close(p, [0.95, 2.1]), "p -= lr * grad, in place: p.data.add_; `p = p - ...` only makes a new tensor"
    assert close(p.grad, [0.5, -1.]), "the gradient is still that of the loss"

@torch.no_grad()
@pytest.mark.parametrize('wd', [0, 0.5, 1, 2])
def test_weight_decay_shrinks_weights(wd):
    p = param()
    ml.weight_decay(p, lr=0.1, wd=wd)
    assert close(p, [1 - 0.1 * wd, 2 - 0.2 * wd]), "each weight loses its share lr * wd, in place: p.data.mul_"
    assert close(p.grad, [0.5, -1.]), "the gradient plays no part"
    ml.weight_decay(p, lr=0.1, wd=wd, do_wd=False)
    assert close(p, [1 - 0.1 * wd, 2 - 0.2 * wd]), "do_wd=False spares this parameter"

@torch.no_grad()
@pytest.mark.parametrize('wd', [0, 0.5, 1, 2])
def test_l2_reg_is_a_penalty_in_the_gradient(wd):
    p = param()
    ml.l2_reg(p, lr=0.1, wd=wd)
    assert close(p.grad, [0.5 + wd, -1 + 2 * wd]), "grad += wd * p, in place: p.grad.data.add_"
    assert close(p, [1., 2.]), "p itself waits for the step"
    ml.l2_reg(p, lr=0.1, wd=wd, do_wd=False)
    assert close(p.grad, [0.5 + wd, -1 + 2 * wd]), "do_wd=False spares this parameter"

@torch.no_grad()
def test_average_grad_fades_the_past():
    p = param()
    avg = ml.average_grad(p, mom=0.9)['grad_avg']
    assert close(avg, [0.5, -1.]), "from 0, the first average is the gradient itself"
    p.grad = torch.ones(2)
    avg = ml.average_grad(p, mom=0.9, grad_avg=avg)['grad_avg']
    assert close(avg, [1.45, 0.1]), "the old average fades by mom, the gradient counts in full"
    assert close(p.grad, [1., 1.]), "begin with zeros of your own: p.grad itself must not become the average"
    avg = ml.average_grad(p, mom=0.9, dampening=True, grad_avg=avg)['grad_avg']
    assert close(avg, [1.405, 0.19]), "dampening=True: the gradient counts by 1 - mom"

@torch.no_grad()
def test_momentum_step_follows_the_average():
    p = param()
    ml.momentum_step(p, lr=0.1, grad_avg=torch.tensor([1., 1.]))
    assert close(p, [0.9, 1.9]) and close(p.grad, [0.5, -1.]), "p -= lr * grad_avg; the gradient is not asked"

def test_step_runs_the_functions_in_order_and_keeps_what_they_return():
    def count(p, n=0, **kwargs): return {'n': n + 1}
    def move(p, n, lr, **kwargs): p.data.add_(p.grad, alpha=-lr * n)     # it returns nothing, that is None
    p, q, r = param(), param(), param()
    r.grad = None
    opt = ml.Optimizer([[p, r], [q]], [count, move], lr=[0.1, 0.2])
    opt.step()
    assert close(p, [0.95, 2.1]), "what one function returns, the next one gets in the same step, by keyword"
    assert close(q, [0.9, 2.2]), "each group has hypers of its own"
    opt.step()
    assert opt.state[p] == {'n': 2} and close(p, [0.85, 2.3]), "the state of a parameter lasts from step to step"
    assert opt.state[r] == {} and close(r, [1., 2.]), "no gradient: no step and no state"

@pytest.mark.parametrize('mine, torchs', [
    ({}, {}), ({'mom': 0.9}, {'momentum': 0.9}),
    ({'wd': 0.1, 'decouple_wd': False}, {'weight_decay': 0.1}),
    ({'mom': 0.9, 'wd': 0.1, 'decouple_wd': False}, {'momentum': 0.9, 'weight_decay': 0.1})])
def test_sgd_equals_torch_over_100_steps(mine, torchs):
    nets = small_net().double(), small_net().double()       # exact enough to show any difference
    opts = [ml.SGD(nets[0].parameters(), lr=0.05, **mine), torch.optim.SGD(nets[1].parameters(), lr=0.05, **torchs)]
    assert_same_after_100_steps(nets, opts)

def run_5():
    train, valid = ml.mnist1d()
    for lr, mom, low, high in [(0.01, 0., 1.85, 2.2), (0.01, 0.9, 1.4, 1.8), (0.1, 0., 1.4, 1.8)]:
        seed_cpu(0)
        model = mnist_mlp()
        dls = ml.DataLoaders.from_tensors(*train, valid=valid, bs=64, seed=0, device='cpu')
        learn = line_learner(dls, model, loss_func=F.cross_entropy, opt_func=functools.partial(ml.SGD, mom=mom), lr=lr)
        learn.fit(5)
        yield f"validation loss, lr {lr}, momentum {mom}", learn.recorder.values[-1][1], low, high

def test_what_lesson_5_shows_on_mnist1d():
    assert_shown(run_5())

# =============================================================================================
lesson(6, "Adam", tried=3, minutes=45,
       goal="write the steps of Adam and RMSProp; they must move weights exactly as torch.optim's do",
       predict="how far does Adam's first step move a weight, and how far if the loss is 1000 times larger?",
       read="section 7, and the beginning of section 13",
       exercises={
           'average_sqr_grad': "as average_grad, with the squares of the gradient; dampened unless said otherwise",
           'debias': "the weights of n gradients are damp, damp * mom, ..., damp * mom**(n-1): a geometric sum",
           'adam_step': "debias(mom, 1 - mom, step) for grad_avg, likewise for sqr_avg; addcdiv_ divides and adds",
           'rms_prop_step': "grad_avg, if there is one, steps in for the gradient; eps is added after the root"})

def weight(value, grad):
    """A parameter of one number, with its gradient."""
    p = nn.Parameter(torch.tensor([value]))
    p.grad = torch.tensor([grad])
    return p

@torch.no_grad()        # as Optimizer.step calls them
def test_average_sqr_grad_fades_the_past():
    p = weight(1., -2.)
    avg = ml.average_sqr_grad(p, sqr_mom=0.9)['sqr_avg']
    assert avg.item() == pytest.approx(0.4), "from 0; the square counts by 1 - sqr_mom, and its sign is gone"
    avg = ml.average_sqr_grad(p, sqr_mom=0.9, sqr_avg=avg)['sqr_avg']
    assert avg.item() == pytest.approx(0.76), "the old average fades by sqr_mom"
    avg = ml.average_sqr_grad(p, sqr_mom=0.9, dampening=False, sqr_avg=avg)['sqr_avg']
    assert avg.item() == pytest.approx(4.684), "dampening=False: the square counts in full"
    assert p.grad.item() == -2, "begin with zeros of your own: p.grad itself must not become the average"

def test_debias_is_the_sum_of_the_weights():
    assert ml.debias(0.8, 0.2, 3) == pytest.approx(0.2 + 0.2 * 0.8 + 0.2 * 0.8**2), "of three gradients"
    assert ml.debias(0.9, 1, 2) == pytest.approx(1.9), "undamped averages can be debiased, too"
    assert ml.debias(0.9, 0.1, 10**4) == pytest.approx(1), "in the end their sum is 1: nothing to correct"

@torch.no_grad()
def test_adam_step_divides_the_average_by_the_size_of_gradients():
    g, s = torch.tensor([0.3]), torch.tensor([0.04])
    debiased, size = 0.3 / (1 - 0.8**2), math.sqrt(0.04 / (1 - 0.9**2))
    for eps, why in ((0., "both averages are debiased, each with its own mom"), (0.5, "eps is added after the root")):
        p = weight(1., 5.)
        ml.adam_step(p, lr=0.1, mom=0.8, step=2, sqr_mom=0.9, grad_avg=g, sqr_avg=s, eps=eps)
        assert p.item() == pytest.approx(1 - 0.1 * debiased / (size + eps)), why
    assert g.item() == pytest.approx(0.3) and s.item() == pytest.approx(0.04), \
        "the averages go on: debiasing is for this step only, so sqrt(), not sqrt_(), of sqr_avg"

@torch.no_grad()
def test_rms_prop_step_takes_the_average_if_there_is_one():
    p, s = weight(1., 0.5), torch.tensor([4.])
    ml.rms_prop_step(p, lr=0.1, sqr_avg=s, eps=1.)
    assert p.item() == pytest.approx(1 - 0.1 * 0.5 / 3), "without an average, the gradient over root and eps"
    p = weight(1., 0.5)
    ml.rms_prop_step(p, lr=0.1, sqr_avg=s, eps=1., grad_avg=torch.tensor([0.]))
    assert p.item() == 1 and s.item() == 4, "grad_avg steps in for the gradient, also where it is 0"

@pytest.mark.parametrize('mine, torchs', [
    (functools.partial(ml.RMSProp, sqr_mom=0.9), functools.partial(torch.optim.RMSprop, alpha=0.9)),
    (functools.partial(ml.RMSProp, wd=0.1, decouple_wd=False),
     functools.partial(torch.optim.RMSprop, weight_decay=0.1)),
    (functools.partial(ml.Adam, wd=0.1),
     functools.partial(torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.1)),
    (functools.partial(ml.Adam, wd=0.1, decouple_wd=False, eps=1e-8, sqr_mom=0.999),
     functools.partial(torch.optim.Adam, weight_decay=0.1))], ids=['rmsprop', 'rmsprop l2', 'adamw', 'adam l2'])
def test_adam_and_rms_prop_equal_torch_over_100_steps(mine, torchs):
    nets = small_net().double(), small_net().double()       # exact enough to show any difference
    opts = mine(nets[0].parameters(), lr=0.01), torchs(nets[1].parameters(), lr=0.01)
    assert_same_after_100_steps(nets, opts)

def run_6():
    train, valid = ml.mnist1d()
    for opt_func, scale, low, high in [(ml.SGD, 1, 2.05, 2.35), (ml.Adam, 1, 1.2, 1.5), (ml.Adam, 1000, 1.2, 1.5)]:
        seed_cpu(0)
        model = mnist_mlp()
        start = model[1].weight.detach().clone()
        dls = ml.DataLoaders.from_tensors(*train, valid=valid, bs=64, seed=0, device='cpu')
        moved = []
        note = ml.Callback(after_step=lambda self: moved.append((model[1].weight - start).abs().max().item() / 0.003))
        learn = line_learner(dls, model, loss_func=lambda pred, y: scale * F.cross_entropy(pred, y),
                             opt_func=opt_func, lr=0.003, cbs=note)
        learn.fit(5)
        name = opt_func.__name__
        if name == 'Adam':
            yield f"{name}, loss times {scale}: longest first step, in lr", moved[0], 0.95, 1.02
        yield f"{name}, loss times {scale}: validation loss", learn.recorder.values[-1][1] / scale, low, high

def test_what_lesson_6_shows_on_mnist1d():
    assert_shown(run_6())

# =============================================================================================
lesson(7, "Schedules", tried=3, minutes=60,
       goal="change the learning rate while training, and find a good one before",
       predict="one training at a constant rate of 0.03, one that rises to it and falls again: which ends better?",
       read="section 9",
       exercises={
           'sched_cos': "(1 - cos(pi * pos)) / 2 goes from 0 to 1: slow, fast, slow",
           'combine_scheds': "check the shares; a part starts at the sum of those before; return a function of pos",
           'ParamScheduler.before_batch': "opt.set_hyper sets the value at pct_train, hps keeps that of the last group",
           'Learner.fit_one_cycle': "set_hyper gives groups their peaks; combined_cos plans for a ParamScheduler",
           'LRFinder.after_batch': "recorder.losses are smoothed; CancelFitException; no comparison with NaN is true"})

def test_a_cosine_is_slow_fast_slow():
    assert [ml.sched_cos(1, 3, pos) for pos in (0, 0.5, 1)] == pytest.approx([1, 2, 3]), "half of the way at half time"
    assert ml.sched_cos(1., 3., 0.25) == pytest.approx(2 - math.cos(math.pi / 4)), "at first below a straight line"

def test_each_part_sees_its_own_position():
    both = ml.combine_scheds([0.25, 0.75], [lambda pos: ('a', pos), lambda pos: ('b', pos)])
    assert both(0) == ('a', 0) and both(0.125) == ('a', 0.5), "the first quarter, from 0 to 1"
    assert both(0.25) == ('b', 0), "at the border, the next one begins"
    assert both(0.625) == ('b', 0.5) and both(1) == ('b', 1), "the rest, from 0 to 1"
    assert both(1 + 1e-9) == ('b', 1), "sums of many small steps may end a little above 1: min(1., ...)"
    three = ml.combine_scheds([0.2, 0.3, 0.5], [lambda pos: pos, lambda pos: 10 + pos, lambda pos: 20 + pos])
    assert [three(pos) for pos in (0.1, 0.35, 0.75)] == pytest.approx([0.5, 10.5, 20.5]), \
        "a part starts after all the shares before it"

def test_a_part_without_a_share_is_at_its_end():
    assert ml.combine_scheds([0., 1.], [None, lambda pos: pos])(0) == 0, "at the beginning it is never seen"
    last = ml.combine_scheds([1., 0.], [lambda pos: pos, lambda pos: 5 + pos])
    assert last(0.5) == 0.5 and last(1.) == 6, "after the last share it has the last word: do not divide by 0"

def test_shares_must_fit():
    for pcts in ([0.5, 0.6], [1.5, -0.5], [1.], [0.5, 0.25, 0.25]):
        with pytest.raises(ValueError):
            ml.combine_scheds(pcts, [lambda pos: pos] * 2)
            pytest.fail(f"{pcts} for two schedules")
    ml.combine_scheds([0.1] * 10, [lambda pos: pos] * 10)       # their sum is 0.9999999999999999

def watched(n_batches=4, **kwargs):
    """A learner on `n_batches`, and the hypers of every group at each training batch, filled by a fit."""
    seen = []
    class Watch(ml.Callback):
        order, run_valid = 70, False
        def after_loss(self): seen.append([dict(hyper) for hyper in self.opt.hypers])
    dls = ml.DataLoaders([line_data(2)] * n_batches, [line_data(2)], device='cpu')
    return line_learner(dls, cbs=Watch, **kwargs), seen

def test_a_schedule_sets_hypers_before_each_training_batch():
    learn, seen = watched()
    learn.fit(2, cbs=ml.ParamScheduler({'lr': lambda pos: pos, 'wd': lambda pos: 1 - pos}))
    done = [i / 8 for i in range(8)]
    assert [groups[0]['lr'] for groups in seen] == pytest.approx(done), "batch i of n is at pct_train = i / n"
    assert [groups[0]['wd'] for groups in seen] == pytest.approx([1 - pos for pos in done]), "every hyper, by its name"
    assert set(learn.recorder.hps) == {'lr', 'wd'} and learn.recorder.hps['lr'] == pytest.approx(done), \
        "what was set is kept in hps, {name: list}; after_fit gives it to the Recorder"
    learn, seen = watched(splitter=lambda model: [[model.a], [model.b]])
    learn.fit(1, cbs=ml.ParamScheduler({'lr': lambda pos: [pos, 2 * pos]}))
    assert [[hyper['lr'] for hyper in groups] for groups in seen] == [[0, 0], [0.25, 0.5], [0.5, 1], [0.75, 1.5]]
    assert learn.recorder.hps == {'lr': [0, 0.5, 1, 1.5]}, "groups may have values of their own; kept is the last one's"

@pytest.mark.parametrize('n_batches', [1, 2, 10])
def test_one_cycle_goes_up_then_down(n_batches):
    learn, seen = watched(n_batches)
    learn.fit_one_cycle(1, 0.1)
    rate = ml.combined_cos(0.25, 0.1 / 25, 0.1, 0.1 / 1e5)
    assert [rate(pos) for pos in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([0.004, 0.052, 0.1, 0.0500005, 1e-6])
    mom = ml.combined_cos(0.25, 0.95, 0.85, 0.95)
    done = [i / n_batches for i in range(n_batches)]
    assert [groups[0]['lr'] for groups in seen] == pytest.approx([rate(pos) for pos in done]), \
        "from lr_max / div up for a quarter of the time, then down to lr_max / div_final"
    assert [groups[0]['mom'] for groups in seen] == pytest.approx([mom(pos) for pos in done]), \
        "momentum, `self.moms`, does the opposite: the lowest where the rate is the highest"

def test_one_cycle_has_options():
    learn, seen = watched(splitter=lambda model: [[model.a], [model.b]])
    counter = EventLog()
    learn.fit_one_cycle(1, [0.01, 0.1], div=10, div_final=100, pct_start=0.5, moms=(0.1, 0.2, 0.3), wd=0.5, cbs=counter)
    assert [hyper['lr'] for hyper in seen[0]] == pytest.approx([0.001, 0.01]), "each group begins at its own peak / div"
    assert [hyper['lr'] for hyper in seen[2]] == pytest.approx([0.01, 0.1]), "pct_start=0.5: half way at the peak"
    assert seen[3][1]['lr'] == pytest.approx((0.1 + 0.001) / 2), "and in the middle of the way to peak / div_final"
    assert [groups[0]['mom'] for groups in seen] == pytest.approx([0.1, 0.15, 0.2, 0.25]), "moms: start, peak, end"
    assert seen[0][0]['wd'] == 0.5 and 'before_fit' in counter.events, "wd and cbs go to the fit"
    assert counter not in learn.cbs and not hasattr(learn, 'param_scheduler'), "which takes its callbacks away again"

def test_one_cycle_can_begin_in_the_middle():
    learn, seen = watched()
    learn.fit_one_cycle(2, start_epoch=1)
    at = ml.combined_cos(0.25, 0.1 / 25, 0.1, 0.1 / 1e5)
    assert [groups[0]['lr'] for groups in seen] == pytest.approx([at(pos) for pos in (0.5, 0.625, 0.75, 0.875)]), \
        "start_epoch goes to the fit: as if the epochs before had run; without lr_max, the peak is the Learner's lr"
    opt = learn.opt
    learn.fit_one_cycle(1)
    assert learn.opt is opt, "the optimizer is kept"
    learn.fit_one_cycle(1, reset_opt=True)
    assert learn.opt is not opt, "unless reset_opt asks for a new one"

def test_one_cycle_does_not_switch_momentum_on():
    learn, seen = watched(opt_func=ml.SGD)
    learn.fit_one_cycle(1)
    assert all(groups[0]['mom'] == 0 for groups in seen) and 'mom' not in learn.recorder.hps, \
        "plain SGD has mom=0, and was meant so: only the rate is scheduled"

def search(losses, **kwargs):
    """After how many batches a search ends whose smoothed losses are scripted."""
    finder, recorder = ml.LRFinder(**kwargs), types.SimpleNamespace(losses=[])
    for i, loss in enumerate(losses, 1):
        recorder.losses += [] if loss is None else [torch.tensor(loss)]
        finder.learn = types.SimpleNamespace(recorder=recorder, train_iter=i, smooth_loss=[None, *recorder.losses][-1])
        try:
            finder.after_batch()
        except ml.CancelFitException:
            break
    return i

def test_a_search_ends_after_its_batches_or_when_the_loss_explodes():
    assert search([1.] * 20, num_it=5) == 5, "after num_it batches"
    assert search([1., 3.9, 4., 2., 1.]) == 5, "up to 4 times the lowest loss it goes on"
    assert search([3., 1., 4.1, 1.]) == 3, "above it ends: of the lowest loss, not of the first one"
    assert search([2., math.nan, 1.]) == 2, "NaN > 4 is False, and so is NaN <= 4: ask for the second, with `not`"
    assert search([1., 9., math.nan, 1.], stop_div=False) == 4, "stop_div=False: however large the loss"
    assert search([1.] * 4 + [9.], stop_div=False, num_it=4) == 4, "but after num_it batches in any case"
    assert search([None, 1.]) == 2, "a batch that was cancelled leaves no loss: nothing has exploded"

def run_7():
    train, test = ml.mnist1d()
    def learner():
        seed_cpu(1)
        dls = ml.DataLoaders.from_tensors(*train, valid=test, device='cpu')
        return line_learner(dls, ml.small_cnn(), loss_func=F.cross_entropy, lr=3e-2, metrics=ml.accuracy)
    yield "a tenth of the rate with the lowest loss", learner().lr_find(show_plot=False).minimum, 1e-3, 1e-1
    constant, one_cycle = learner(), learner()
    constant.fit(2)
    one_cycle.fit_one_cycle(2)
    yield "accuracy after 2 epochs at a constant rate", constant.final_record[-1], 0.6, 0.94
    yield "accuracy after one cycle of 2 epochs", one_cycle.final_record[-1], 0.9, 0.98
    yield "what the schedule gains", one_cycle.final_record[-1] - constant.final_record[-1], 0.005, 0.35

def test_what_lesson_7_shows_on_mnist1d():
    assert_shown(run_7())

# =============================================================================================
lesson(8, "Callbacks of your own, and transfer", tried=3, minutes=75,
       goal="write callbacks from their description alone, then reuse a trained network for a task with little data",
       predict="you accumulate two batches of 8 and 4 rows: is the mean of their two gradients that of the 12 rows?",
       read="sections 12 and 14",
       exercises={
           'GradientClip.before_step': "nn.utils.clip_grad_norm_; the optimizer's all_params knows the parameters",
           'GradientAccumulation.before_backward': "backward starts from self.learn.loss_grad; mean times rows is sum",
           'GradientAccumulation.before_step': "gradients add up in self.sums, rows in self.count; a Cancel waits",
           'EarlyStoppingCallback.after_epoch': "super() sets best_row; recorder.values has a row an epoch; `say`",
           'Optimizer.freeze_to': "requires_grad_ decides; a gradient that is left would move a weight once more",
           'Learner.fine_tune': "ensure_opt, freeze, fit_one_cycle with slice(base_lr), unfreeze, slice(a, b)"})

def fit_line(batches, *cbs, n_epoch=1, model=None):
    """The learner after a fit on these batches by SGD."""
    learn = line_learner(ml.DataLoaders(batches, device='cpu'), model, opt_func=ml.SGD, cbs=[*cbs])
    learn.fit(n_epoch)
    return learn

def cut(*sizes):
    """Batches of these sizes, in order."""
    return list(zip(*(t.split(sizes) for t in line_data(sum(sizes)))))

def same_fit(a, b):
    return all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(weights(a.model), weights(b.model)))

@pytest.mark.parametrize('max_norm, norm_type', [(0.1, 2.), (0.1, 1.), (0.1, math.inf), (1e9, 2.)])
def test_clipped_gradients_keep_their_direction(max_norm, norm_type):
    def grads(*cbs):
        seen = []
        fit_line(cut(8), *cbs, ml.Callback(after_step=lambda self: seen.append(
            torch.stack([self.model.a.grad, self.model.b.grad]))))
        return seen[0]
    free, clipped = grads(), grads(ml.GradientClip(max_norm, norm_type))
    assert clipped.norm(norm_type) <= max_norm * 1.0001, "of all gradients together, before the step is made"
    factor = min(1, max_norm / free.norm(norm_type))
    assert torch.allclose(clipped, free * factor, rtol=1e-3), "scaled down together, and only if they are too long"

@pytest.mark.parametrize('small, large, n_acc', [
    ([4] * 8, [16, 16], 16), ([4] * 10, [16, 16, 8], 16), ([3] * 5 + [1], [9, 7], 7), ([8, 4, 8], [12, 8], 10),
    ([4, 4], [4, 4], 1), ([4, 4], [8], 100)])
def test_accumulated_equals_large_batch(small, large, n_acc):
    acc = fit_line(cut(*small), ml.GradientAccumulation(n_acc), n_epoch=2)
    one = fit_line(cut(*large), n_epoch=2)
    assert same_fit(acc, one), "rows weigh the same, however they were cut; the last window may be smaller"
    (x, y), *_ = cut(*small)
    loss = F.mse_loss(Line()(x), y).item()
    assert acc.recorder.losses[0].item() == pytest.approx(loss), "the loss is reported as it is"

def test_accumulation_passes_over_what_has_no_gradient():
    def skip(self):
        if self.iter == 1: raise ml.CancelBackwardException
    (x, y), _, (x2, y2) = batches = cut(8, 6, 8)
    model = Line()
    model.unused = nn.Parameter(torch.ones(2))
    acc = fit_line(batches, ml.GradientAccumulation(100), ml.Callback(before_backward=skip), model=model)
    assert model.unused.tolist() == [1, 1], "a parameter that the loss does not reach stays as it is"
    del model.unused
    assert same_fit(acc, fit_line([(torch.cat([x, x2]), torch.cat([y, y2]))])), \
        "a batch without a backward pass has no gradients: its rows do not count"

def scored(*scores, **kwargs):
    """A learner whose column `score` has these values, epoch by epoch, with an EarlyStoppingCallback."""
    learn = line_learner(metrics=ml.ValueMetric(lambda: scores[learn.epoch], 'score'), opt_func=ml.SGD,
                         cbs=ml.EarlyStoppingCallback('score', **kwargs))
    return learn

@pytest.mark.parametrize('scores, kwargs, n_epochs', [
    ([1, 2, 3, 4, 5], {}, 5), ([1, 2, 2, 3, 4], {}, 3), ([3, 2, 1, 4, 5], {'patience': 2}, 3),
    ([1, 2, 1, 3, 3], {'patience': 2}, 5), ([1, 1.05, 1.3, 1.35, 2], {'min_delta': 0.1}, 2), ([1, math.nan, 2], {}, 2)])
def test_early_stopping_stops_after_patience_and_says_why(scores, kwargs, n_epochs, capsys):
    learn = scored(*scores, **kwargs)
    learn.logger = print
    learn.fit(len(scores))
    *rows, told = capsys.readouterr().out.splitlines()
    assert len(learn.recorder.values) == n_epochs, "no new best: equal, NaN, or better by less than min_delta"
    if n_epochs < len(scores):
        best = n_epochs - 1 - kwargs.get('patience', 1)
        assert len(rows) == n_epochs and 'score' in told and str(best) in told, \
            "below the rows, a line: what was watched, and since which epoch it did not get better"
    learn.fit(len(scores))
    assert len(learn.recorder.values) == n_epochs, "in the next fit patience begins anew"

def test_freeze_to_decides_what_trains():
    ps = [nn.Parameter(torch.ones(1)) for _ in range(4)]
    opt = ml.Optimizer([ps[:2], [ps[2]], [ps[3]]], ml.sgd_step, lr=0.1)
    opt.state[ps[1]]['force_train'] = True
    for n, trains, first in [(1, [0, 1, 1, 1], 1), (2, [0, 1, 0, 1], 2), (-2, [0, 1, 1, 1], 1), (0, [1, 1, 1, 1], 0)]:
        with warnings.catch_warnings():
            warnings.simplefilter('error')      # there is something left to train
            opt.freeze_to(n)
        assert [p.requires_grad for p in ps] == trains, f"freeze_to({n}); what is marked force_train trains in any case"
        assert opt.frozen_idx == first, "frozen_idx is the first group that trains, counted from the beginning"
    with pytest.warns(UserWarning):
        opt.freeze_to(3)        # all that there is
    assert [p.requires_grad for p in ps] == [0, 1, 0, 0]

def test_a_frozen_weight_does_not_move_once_more():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    opt = ml.SGD([[p], [q]], lr=0.1, wd=0.5)
    (p + q).backward()
    opt.freeze_to(1)
    opt.step()
    assert p.item() == 1 and q.item() != 1, "its gradient is gone, that of the others is not"
    opt = ml.SGD([q], lr=0.1)
    with pytest.raises(ValueError):
        opt.freeze_to(-1)       # of a single group
    assert q.requires_grad, "refused before anything changed"
    opt.freeze_to(0)            # to train all is no freezing

def two_layers(n_batches=10, **kwargs):
    """A learner of two groups, and a list of (body trains, [lr, lr]) of each batch to come."""
    seen, body, head = [], nn.Linear(10, 8), nn.Linear(8, 3)
    note = ml.Callback(after_loss=lambda self: seen.append(
        (body.weight.requires_grad, [h['lr'] for h in self.opt.hypers])))
    return line_learner(ml.DataLoaders(class_batches(n_batches), device='cpu'), nn.Sequential(body, head), cbs=note,
                        loss_func=F.cross_entropy, splitter=lambda m: [list(o.parameters()) for o in m], **kwargs), seen

def test_fine_tune_trains_the_head_then_all():
    learn, seen = two_layers()
    learn.fine_tune(2, base_lr=1e-2, freeze_epochs=3, lr_mult=10)
    assert [body for body, _ in seen] == [False] * 30 + [True] * 20, "freeze_epochs with a frozen body, then all layers"
    rates = [lrs[1] for _, lrs in seen]
    assert rates[:30] == sorted(rates[:30]), "the first part warms up almost to its end: pct_start=0.99"
    assert rates[0] == pytest.approx(1e-2 / 25) and rates[29] == pytest.approx(1e-2, rel=0.1), "its peak is base_lr"
    assert seen[30][1] == pytest.approx([5e-4 / 5, 5e-3 / 5]), "then half of it, and for the body a lr_mult-th; div=5"
    assert seen[36][1] == pytest.approx([5e-4, 5e-3]), "the peak of the second part is at pct_start=0.3"

def test_fine_tune_hands_its_arguments_on():
    (learn, seen), epochs = two_layers(), []
    learn.fine_tune(1, pct_start=0.5, div=2, cbs=ml.Callback(before_epoch=lambda self: epochs.append(self.epoch)))
    assert seen[10][1] == pytest.approx([1e-5 / 2, 1e-3 / 2]), "div of the second part, of base_lr=2e-3, lr_mult=100"
    assert seen[15][1] == pytest.approx([1e-5, 1e-3]), "pct_start of the second part"
    assert epochs == [0, 0], "all further arguments are for both parts"

def test_fine_tune_makes_a_new_optimizer_only_if_asked_and_once():
    made = []
    learn, _ = two_layers(1, opt_func=lambda params, lr: made.append(1) or ml.SGD(params, lr=lr))
    for reset_opt, n in [(False, 1), (False, 1), (True, 2)]:
        learn.fine_tune(1, reset_opt=reset_opt)
        assert len(made) == n, "reset_opt=True: a new one for the first part, and the second goes on with it"
    learn.fine_tune(1)
    assert len(made) == 2, "to keep it is the default"

def signal_net(n_out):
    """A network for `mnist1d`: a body that knows signals, a head that knows classes."""
    body = nn.Sequential(nn.Conv1d(1, 32, 5, 2, padding=2, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
                         nn.Conv1d(32, 64, 5, 2, padding=2, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
                         nn.AdaptiveAvgPool1d(4), nn.Flatten())
    return nn.Sequential(body, nn.Linear(256, n_out))

def run_8():
    (x, y), (x_test, y_test) = ml.mnist1d()
    def learner(model, wanted, n, bs, **kwargs):
        pick, pick_test = [torch.isin(t, torch.tensor(wanted)) for t in (y, y_test)]
        dls = ml.DataLoaders.from_tensors(x[pick][:n], y[pick][:n] - wanted[0], bs=bs, seed=0, device='cpu',
                                          valid=(x_test[pick_test], y_test[pick_test] - wanted[0]))
        return line_learner(dls, model, loss_func=F.cross_entropy, metrics=ml.accuracy,
                            splitter=lambda m: [list(part.parameters()) for part in m], **kwargs)
    seed_cpu(0)
    old = learner(signal_net(5), [0, 1, 2, 3, 4], 2000, 64, cbs=ml.GradientClip(1.))
    old.fit_one_cycle(6, 1e-2)
    yield "accuracy on digits 0 to 4, 2000 samples", old.recorder.values[-1][-1], 0.8, 1.
    scratch = learner(signal_net(5), [5, 6, 7, 8, 9], 60, 10)
    scratch.fit_one_cycle(15, 1e-2)
    yield "on digits 5 to 9, 60 samples, from scratch", scratch.recorder.values[-1][-1], 0.4, 0.6
    new = signal_net(5)
    new[0].load_state_dict(old.model[0].state_dict())
    tuned = learner(new, [5, 6, 7, 8, 9], 60, 10)
    tuned.fine_tune(5, 1e-2, freeze_epochs=10, lr_mult=10)
    yield "the same, fine-tuned from digits 0 to 4", tuned.recorder.values[-1][-1], 0.55, 0.75

def test_what_lesson_8_shows_on_mnist1d():
    assert_shown(run_8())

# =============================================================================================
lesson(9, "Inference", tried=5, minutes=75,
       goal="predictions for all rows, in the order of the data, that disturb no training",
       predict="how often is a network right where it gives its answer a high probability, and where it does not?",
       read="section 10 of minilearner.py, and `restored` and `replacing` in its section 8",
       exercises={
           'Learner.validation_context': "`restored` puts back what you change; see .only_fit, model.to, .eval",
           'run_validation': "the events are as in _one_epoch; a DataLoader without a generator draws a seed from "
                             "torch's in each pass: lend it OWN_GENERATOR, by `replacing`",
           'GatherPredsCallback.after_batch': "`keep` what is asked for, of completed batches; see n_rows",
           'act_and_decodes': "a `partial` has the function in .func; map_tensors goes into tuples",
           'Learner.get_preds': "a GatherPredsCallback in run_validation; then `concat`; loss_not_reduced is a context",
           'Learner.predict': "a batch of one, t[None], all of it input (`dls.split`), for get_preds; see check_item",
           'Learner.tta': "a callback changes self.learn.xb in before_batch; torch.stack the passes"})

def test_validation_context_is_for_predictions():
    learn = line_learner(line_dls(device='meta'))
    learn.model.train()
    learn.training, learn.dl, learn.logger = True, 'mine', print
    with pytest.raises(KeyboardInterrupt), learn.validation_context(EventLog) as yielded:
        assert yielded is learn and not learn.training and not learn.model.training, "in evaluation mode"
        assert not torch.is_grad_enabled(), "a graph would cost memory for nothing"
        assert [cb.name for cb in learn.cbs] == ['train_eval', 'event_log'], "the Recorder is for fits (`only_fit`)"
        assert learn.logger is not print, "a callback that logs would disturb the table of a fit"
        assert learn.model.a.device.type == 'meta', "the model may have been on another device than the data"
        learn.dl = 'other'
        raise KeyboardInterrupt
    assert learn.training and learn.model.training and learn.dl == 'mine' and learn.logger is print, "all is put back"
    assert torch.is_grad_enabled() and [cb.name for cb in learn.cbs] == ['train_eval', 'recorder']

def test_validation_is_a_pass_with_its_events():
    learn, log, seen = line_learner(), EventLog(), []
    ml.run_validation(learn, 1, None, True, [log])
    batch = ['before_batch', 'after_pred', 'after_loss', 'after_batch']
    assert log.events == ['before_validate', *batch, *batch, 'after_validate'], "24 rows are two batches"
    ml.run_validation(learn, 1, [line_data(3)], True, ml.Callback(after_pred=lambda self: seen.append(len(self.pred))))
    assert seen == [3], "`dl` is taken if there is one, else the loader of that number"
    ml.run_validation(learn, 1, None, True, RaiseAt('before_batch', ml.CancelValidException()))     # is no error

def test_validation_reorders_and_draws_no_number_from_the_training():
    x, y = line_data(20)
    learn, seen = line_learner(), []
    note = ml.Callback(before_batch=lambda self: seen.append(self.x))
    for reorder in (True, False):
        ml.run_validation(learn, 1, ml.TensorLoader(x, y, bs=8, shuffle=True, drop_last=True), reorder, note)
    assert torch.cat(seen[:3]).equal(x), "reorder: all rows in the order of the data, see in_order"
    assert len(seen) == 5 and not torch.cat(seen[3:]).equal(x[:16]), "without: the batches of the loader as they come"
    loader, before = DataLoader(TensorDataset(x, y), batch_sampler=[[0, 1], [2]]), torch.get_rng_state()
    ml.run_validation(learn, 1, loader, True, note)
    assert torch.get_rng_state().equal(before) and loader.generator is None, \
        "a look at the predictions must not change the training after it: lend the loader a generator"

def test_predictions_are_gathered_batch_by_batch(tmp_path):
    batches = [(torch.ones(n, 1), torch.arange(3.).expand(n, 3)) for n in (4, 2)]
    learn = line_learner(model=nn.Linear(1, 3), loss_func=lambda pred, y: (pred - y)**2)
    y, pred = torch.arange(3.).expand(6, 3), learn.model(torch.ones(6, 1))

    def gathered(cbs=None, dl=batches, **kwargs):
        cb = ml.GatherPredsCallback(**kwargs)
        ml.run_validation(learn, 1, dl, True, [cb, *ml.listify(cbs)])
        return cb
    plain = gathered(save_targs=tmp_path / 'y')
    assert torch.cat(plain.preds).equal(pred) and len(plain.preds) == 2 and plain.inputs == plain.losses == []
    assert plain.targets == [] and torch.load(tmp_path / 'y' / '000_00001.pt').equal(y[4:]), "in the folder alone"
    full = gathered(act=torch.exp, with_input=True, with_loss=True, save_preds=tmp_path)
    assert full.preds == [] and torch.load(tmp_path / '000_00001.pt').equal(pred[4:].exp()), "`act` of the prediction"
    assert torch.cat(full.inputs).equal(torch.ones(6, 1)) and torch.cat(full.targets).equal(y)
    assert torch.allclose(torch.cat(full.losses), ((pred - y)**2).mean(1)), "one number a row: the mean of its losses"
    skip_first = RaiseAt('before_batch', ml.CancelBatchException())
    assert [len(p) for p in gathered(skip_first).preds] == [2] and gathered(dl=[torch.ones(4, 1)]).targets == []
    with pytest.raises(ValueError):     # a loss without targets
        gathered(dl=[torch.ones(4, 1)], with_loss=True)

@pytest.mark.parametrize('losses, act, decodes', [
    ([nn.CrossEntropyLoss(), F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.1)],
     lambda t: t.softmax(1), lambda t: t.argmax(1)),
    ([nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits], torch.sigmoid, lambda t: t > 0.5),
    ([F.mse_loss], lambda t: t, lambda t: t),
    ([types.SimpleNamespace(activation=torch.exp, decodes=torch.neg)], torch.exp, torch.neg)])
def test_activation_and_decision_come_from_the_loss(losses, act, decodes):
    pred, probs = torch.randn(5, 3, 4), torch.tensor([[0.4, 0.5, 0.6]])
    for own_act, own_decodes in map(ml.act_and_decodes, losses):
        assert own_act(pred).equal(act(pred)), "dimension 1 holds the classes"
        assert own_decodes(probs).equal(decodes(probs)), "yes is above 0.5, of probabilities"
        if callable(losses[0]):     # each of a tuple of outputs
            assert own_act((pred, pred))[1].equal(act(pred)) and own_decodes((probs, probs))[1].equal(decodes(probs))

def test_get_preds_gives_all_rows_in_the_order_of_the_data(tmp_path):
    (x, y), model = class_batches(1, bs=20)[0], small_net()
    dls = ml.DataLoaders(ml.TensorLoader(x, y, bs=7, shuffle=True), device='cpu')
    learn = line_learner(dls, model, loss_func=F.cross_entropy)
    inputs, preds, targets, decoded, losses = learn.get_preds(0, with_input=True, with_decoded=True, with_loss=True)
    probs = model.eval()(x).softmax(1)
    assert inputs.equal(x) and targets.equal(y) and torch.allclose(preds, probs), "each at the place of its row"
    assert decoded.equal(probs.argmax(1)) and torch.allclose(losses, F.cross_entropy(model(x), y, reduction='none'))
    assert len(learn.get_preds(0)) == 2 and learn.loss_func is F.cross_entropy, "the loss is reduced again"
    assert torch.allclose(learn.get_preds(0, act=torch.exp)[0], model(x).exp()), "act= takes the place of softmax"
    sideways, none = learn.get_preds(dl=[x, x], concat_dim=1)
    assert sideways.shape == (20, 6) and none is None, "joined along concat_dim; without targets there are none"
    log = EventLog()
    assert not learn.get_preds(0, reorder=False, cbs=log)[1].equal(y) and log.events, "cbs= take part"
    none, _ = learn.get_preds(0, save_preds=tmp_path / 'p', save_targs=tmp_path / 't')
    assert none is None and torch.load(tmp_path / 't' / '000_00000.pt').equal(y[:7])

class Sum(nn.Module):
    def forward(self, a, b):
        return a + b

def test_predict_takes_one_item():
    x, y = class_batches(1)[0]
    dls = ml.DataLoaders(ml.TensorLoader(x, y), device='cpu', vocab='abc')
    learn = line_learner(dls, small_net(), loss_func=F.cross_entropy)
    given, name, decoded, probs = learn.predict(x[2].double().numpy(), with_input=True)
    expected = learn.model.eval()(x[2:3]).softmax(1)[0]
    assert given.equal(x[2]) and torch.allclose(probs, expected), "an array, too (see as_tensors); no batch dimension"
    assert decoded == expected.argmax() and name == 'abc'[decoded] and len(learn.predict(x[2])) == 3
    with pytest.raises(ValueError):
        learn.predict(x)        # a batch, and not an item
    learn.model, learn.loss_func, dls.targets = Sum(), F.mse_loss, ['y']
    given, *_, pred = learn.predict((x[0], x[1]), with_input=True)
    assert pred.equal(x[0] + x[1]) and len(given) == 2, "an item has no target: all of it is input"
    assert dls.split_batch((x, y))[1] == (y,), "afterwards, batches are split as before"
    given, *_, pred = learn.predict({'a': x[0], 'b': x[1].numpy(), 'y': y}, with_input=True)
    assert pred.equal(x[0] + x[1]) and set(given) == {'a', 'b'}, "the model gets what is no target, as keywords"
    dls.train = DataLoader(torch.utils.data.ChainDataset([]))
    assert learn.predict((x[0], x[1]))[-1].equal(pred), "a stream has no row to compare an item with"

def test_tta_mixes_augmented_and_plain_predictions():
    learn = line_learner()      # y = 0.5 * x - 0.5
    x, y = learn.dls.valid_ds.tensors
    plain, steps = learn.model(x), iter([0., 2., -1., 0.6, 2., 4.])
    preds, targets = learn.tta(batch_tfms=lambda xb: xb + 1)
    assert torch.allclose(preds, plain + 0.75 * 0.5) and targets.equal(y), "beta is the share of the plain ones"
    augmented, bare = learn.tta(dl=[(x, y)], batch_tfms=lambda xb: xb + next(steps), beta=None)
    assert torch.allclose(augmented, plain + 0.5 * 0.4) and torch.allclose(bare, plain), "the mean of four, unmixed"
    assert torch.allclose(learn.tta(dl=[(x, y)], n=2, batch_tfms=lambda xb: xb + next(steps), beta=0.)[0], plain + 1.5)
    learn.model = Sum()
    augmented, _ = learn.tta(dl=[(x, x, y)], item_tfms=lambda item: item + len(item), beta=None)
    assert torch.allclose(augmented, 2 * x + 1), "of several inputs, the first, one item of shape (1,) at a time"

def run_9(seed=0):
    (x, y), test = ml.mnist1d()
    seed_cpu(seed)
    net = mnist_mlp()
    dls = ml.DataLoaders.from_tensors(x, y, valid=test, device='cpu')
    learn = ml.Learner(dls, net, F.cross_entropy, metrics=ml.accuracy)
    learn.fit_one_cycle(8, 1e-2)
    probs, targets, decoded = learn.get_preds(with_decoded=True)
    right, by_sureness = (decoded == targets).float(), probs.amax(1).argsort()
    yield "accuracy of the half where the network is surer", right[by_sureness[500:]].mean().item(), 0.7, 0.9
    yield "of the other half", right[by_sureness[:500]].mean().item(), 0.2, 0.45

def test_what_lesson_9_shows_on_mnist1d():
    assert_shown(run_9())

# =============================================================================================
lesson(10, "Saving", tried=4, minutes=60,
       goal="files that are whole or not there, that open with stock torch, and run no code when they are read",
       predict="the power fails while a network is written to a file: what is in the file afterwards?",
       read="section 11",
       exercises={
           'save_state': "write to another name, then flush, os.fsync; os.replace is done in one go",
           'load_state': "a zip, whose `testzip` sees what torch.load does not, and moves the place in an open file",
           'bare_state': "torch.compile keeps the model in `_orig_mod`, DataParallel in `module`, also a name of parts",
           'put_state': "compare with bare_state, by key and `kind`; change nothing before all is known to fit, an "
                        "optimizer included; a checkpoint has more keys than 'model' and 'opt'",
           'Learner.export': "`restored` puts back what you take out: loaders (of a copy of dls), optimizer, batch, "
                             "`distributed`; the logger is print again"})

def test_a_file_is_written_in_one_go(tmp_path, monkeypatch):
    file, sizes, fsync = tmp_path / 'some' / 'where' / 'a.pth', [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: sizes.append((os.fstat(fd).st_size, file.exists(), fsync(fd))))
    ml.save_state({'a': torch.ones(2)}, str(file))
    assert torch.load(file)['a'].tolist() == [1, 1], "missing folders are made"
    content = file.read_bytes()
    assert sizes == [(len(content), False, None)], "all of it is on the disk (fsync) before the file gets its name"

    def full_disk(state, f, **kwargs):
        f.write(b'half')
        raise OSError('no space left on device')
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError):
        ml.save_state({'a': torch.zeros(2)}, file)
    assert file.read_bytes() == content and list(file.parent.iterdir()) == [file], "the old file stays whole"

def test_files_are_read_to_a_device_and_where_they_stand():
    start = 4 * (tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6))     # 2.4 finds no zip after other bytes
    buffer, places = io.BytesIO(b'mine'[:start]), []
    buffer.seek(start)
    ml.save_state(torch.ones(2), buffer)
    for device in ([], ['meta'], [None]):
        buffer.seek(start)
        places.append(ml.load_state(buffer, *device).device.type)
    assert places == ['cpu', 'meta', 'cpu'], "the CPU by default, so that files from a GPU can be read anywhere"

def test_bad_files_run_no_code_and_are_named(tmp_path):
    file, numbers = tmp_path / 'a.pth', torch.full((8,), 7.)
    with pytest.raises(FileNotFoundError):
        ml.load_state(file)
    ml.save_state(type('Evil', (), {'__reduce__': lambda self: (os.mkdir, (str(tmp_path / 'was-here'),))})(), file)
    with pytest.raises(ValueError, match='a.pth'):
        ml.load_state(file)
    assert not (tmp_path / 'was-here').exists(), "code of the file was run: weights_only=True forbids that"
    ml.save_state(numbers, file)
    data = bytearray(file.read_bytes())
    data[data.index(numbers.numpy().tobytes())] ^= 1      # the zip's checksum tells; torch.load does not look at it
    file.write_bytes(data)
    with pytest.raises(ValueError, match='a.pth'):
        ml.load_state(file)
    ml.save_state(Line, file)
    assert ml.load_state(file, weights_only=False) is Line, "for those who trust the file"

def compiled(model):        # keeps it as torch.compile does
    return nn.ModuleDict({'_orig_mod': model})

def test_wrappers_leave_no_mark_in_the_keys():
    model = nn.ModuleDict({'module': nn.Linear(1, 1), 'other': compiled(compiled(nn.Linear(1, 1, bias=False)))})
    bare = ['module.weight', 'module.bias', 'other.weight']
    assert list(ml.bare_state(model)) == bare, "also of parts inside; a part that is named `module` keeps its name"
    assert list(ml.bare_state(compiled(nn.DataParallel(compiled(model))))) == bare, "through several wrappers"

def test_a_state_is_loaded_as_a_whole_or_not_at_all():
    model, state = nn.Linear(2, 1), {'weight': torch.full((1, 2), 7.), 'bias': torch.full((1,), 7.)}
    too_small = {**state, 'weight': torch.zeros(1)}
    for wrong in ({'bias': state['bias']}, {**state, 'more': torch.ones(1)}, too_small, {**state, 'bias': 7.}, [1]):
        with pytest.raises(ValueError, match='the_file'):
            ml.put_state('the_file', wrong, model, None)
        assert 7 not in model.bias, "strict: check all tensors before the first is copied"
    with pytest.warns(UserWarning, match='the_file(?=.*more)(?=.*weight)'):
        ml.put_state('the_file', {**too_small, 'more': torch.ones(1)}, model, None, strict=False)
    assert model.bias == 7 and 0 not in model.weight, "else what fits is loaded, and a warning names the others"
    with warnings.catch_warnings(action='error'):
        ml.put_state('the_file', {'_orig_mod.' + k: v + 1 for k, v in state.items()}, compiled(model), None)
    assert model.bias == 8 and model.weight.tolist() == [[8, 8]], "with or without wrappers, on both sides"

def test_the_optimizer_is_loaded_on_demand():
    learn, model, unlike = line_learner(), Line(), ml.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    learn.fit(1)
    weights_only, both = learn.model.state_dict(), {'model': learn.model.state_dict(), 'opt': learn.opt.state_dict()}
    for with_opt, lr in ((None, 0.1), (True, 0.1), (False, 0.5)):
        opt = ml.Adam(Line().parameters(), lr=0.5)
        ml.put_state('f', both, Line(), opt, with_opt)
        assert opt.hypers[0]['lr'] == lr, "None: if it is in the file"
    ml.put_state('f', {**both, 'more': 1}, Line(), None)
    ml.put_state('f', weights_only, Line(), opt)
    for state, kwargs in ((weights_only, {'with_opt': True}), (both, {}), (both, {'strict': False, 'with_opt': True})):
        with pytest.raises(ValueError):
            ml.put_state('f', state, model, unlike, **kwargs)
        assert same(weights(model), weights(Line())), "if the optimizer is refused, the weights stay, too"
    with pytest.warns(UserWarning, match='optimizer'):
        ml.put_state('f', both, model, unlike, strict=False)
    assert same(weights(model), weights(learn.model)) and unlike.hypers[0]['lr'] == 0.5

def test_export_takes_all_but_the_data(tmp_path):
    x, y = line_data(20000)
    dls = ml.DataLoaders(*[ml.TensorLoader(x, y, bs=10000)] * 3, device='cpu', path=tmp_path, vocab='ab')
    learn = line_learner(dls, cbs=type('DistributedCallback', (ml.Callback,), {}))
    learn.fit(1)
    learn.xb, opt = (x,), learn.opt
    file = learn.export()
    assert file == tmp_path / 'export.pkl' and file.stat().st_size < 50000, "neither loaders nor batches"
    assert learn.dls is dls and learn.opt is opt and learn.xb[0] is x and learn.distributed in learn.cbs, "put back"
    assert learn.logger is not print and len(dls.train) == 2 and len(dls.loaders) == 3, "a copy of `dls` loses its data"
    loaded = ml.load_learner(file)
    assert loaded.get_preds(dl=[x[:5]])[0].equal(learn.get_preds(dl=[x[:5]])[0]) and loaded.dls.vocab == 'ab'
    assert list(loaded.dls.loaders) == [[], None] and loaded.opt is None and loaded.logger is print
    assert loaded.recorder.learn is loaded and learn.export('b.pkl') == tmp_path / 'b.pkl'

def run_10():
    train, test = ml.mnist1d()
    dls = ml.DataLoaders.from_tensors(*train, valid=test, bs=250, device='cpu')
    learn, other = (line_learner(dls, mnist_mlp(), loss_func=F.cross_entropy, metrics=ml.accuracy) for _ in range(2))
    learn.fit(10, 1e-2)
    with tempfile.TemporaryDirectory() as learn.path:
        file = learn.save(Path(learn.path, 'whole').resolve())
        yield "accuracy", learn.validate()[1], 0.45, 0.7
        yield "accuracy that saving and loading lose", learn.validate()[1] - other.load(file).validate()[1], 0, 0
        file.write_bytes(file.read_bytes()[:-100])      # the power failed
        with pytest.raises(ValueError):
            other.load(file)
        yield "files that are refused, of one that was cut", 1, 1, 1

def test_what_lesson_10_shows_on_mnist1d():
    assert_shown(run_10())

# =============================================================================================
lesson(11, "A shelf of callbacks", tried=3, minutes=50, read="section 14",
       goal="change batches, stop before NaN, keep the best weights, penalize activations",
       predict="with which weights does a fit of ten epochs end if the fourth was best? And with SaveModelCallback?",
       exercises={
           'before_batch_cb': "f is given self.x and self.y; xb and yb of the learner are tuples: tuplify",
           'TerminateOnNaNCallback.after_loss': "to_detach(self.loss, cpu=False) is that of all processes; `say` why",
           'SaveModelCallback.after_epoch': "compare, as trackers do; every_epoch: if `completed`; else if new_best",
           'SaveModelCallback.after_fit': "not after a failure; at_end saves; else load the best if any, if it trained",
           'RNNRegularizer.after_loss': "mean squares, in float32, of out[-1], raw_out[-1].diff(dim=1); forget both"})

def test_a_function_may_change_every_batch():
    change = ml.before_batch_cb(lambda self, x, y: (x * 2, y + self.epoch))
    batches, (x, y) = [], line_data(4)
    note = ml.Callback(before_batch=lambda self: batches.append((self.xb, self.yb)))
    line_learner(ml.DataLoaders([(x, y)], [(x, y)], device='cpu'), cbs=[change, note]).fit(2)
    for epoch, ((xb,), (yb,)) in zip((0, 0, 1, 1), batches, strict=True):
        assert xb.equal(x * 2) and yb.equal(y + epoch), "batches are tuples; f sees the callback, thereby the learner"

def test_no_infinite_loss_reaches_the_weights():
    x, y = line_data(8)
    dls = ml.DataLoaders([(x, y), (x, y * math.inf)], [(x, y * math.inf)], device='cpu')
    learn = line_learner(dls, cbs=ml.TerminateOnNaNCallback)
    learn.fit(3)
    assert all(w.isfinite().all() for w in weights(learn.model)), "it stops before the step"
    assert len(learn.recorder.losses) == 1 and learn.epoch == 0, "the batch is not recorded, and no epoch follows"
    assert not math.isfinite(learn.validate()[0]), "in validation no weights are at risk: the result shows it"

class Scripted(ml.Callback):
    """Its metric `score` has these values, or raises them, epoch by epoch; it notes weights, and which are best."""
    order = 70      # after the trackers

    def __init__(self, values): self.values, self.weights, self.bests = values, [], []

    def score(self, pred, y):
        value = self.values[self.epoch]
        if isinstance(value, type): raise value
        return value

    def after_epoch(self):
        self.weights.append(weights(self.model))
        self.bests += [cb.new_best for cb in self.learn.cbs if isinstance(cb, ml.TrackerCallback)]

def scripted(values, *cbs, **kwargs):
    script = Scripted(values)
    return line_learner(cbs=[script, *cbs], metrics=script.score, **kwargs)

@pytest.mark.parametrize('values, kwargs, best', [
    ([1, 2, 2, 3], {}, [1, 1, 0, 1]), ([3, 2, 3.5, math.nan], {}, [1, 0, 1, 0]),
    ([1, ml.CancelEpochException, ml.CancelValidException, 2], {}, [1, 0, 0, 1]),
    ([5, 4, 3.9375, 3.75], {'comp': lambda a, b: a < b, 'min_delta': 0.1}, [1, 1, 0, 1])])
def test_a_tracker_knows_the_best_epoch(values, kwargs, best):
    cb = ml.TrackerCallback('score', **kwargs)
    learn = scripted(values, cb)
    learn.fit(4)
    assert learn.scripted.bests == best, "not if equal, NaN, skipped, or better by less than min_delta"
    last = max(i for i in range(4) if best[i])
    assert cb.best == values[last] == learn.recorder.values[cb.best_row - 1][2], "best_row: the number of rows up to it"

def test_the_best_model_comes_back(tmp_path):
    learn = scripted([], ml.SaveModelCallback('score'), path=tmp_path)
    for learn.scripted.values, best in [([1, 3, math.nan, 2], 1), ([math.nan] * 2, -1)]:
        learn.fit(len(learn.scripted.values))
        assert same(weights(learn.model), learn.scripted.weights[best]), "epoch 1; of two that are NaN none is loaded"

@pytest.mark.parametrize('at_end', [False, True])
def test_a_fit_that_failed_keeps_its_last_weights(tmp_path, at_end):
    save = ml.SaveModelCallback('score', at_end=at_end, reset_on_fit=False)
    learn = scripted([2, KeyboardInterrupt], save, path=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2)
    last, saved = weights(learn.model), torch.load(tmp_path / 'models/model.pth', weights_only=True)
    assert not same(last, list(saved.values())), "the file has epoch 0; it is not loaded, nor are these weights saved"
    learn.fit(2, start_epoch=2)
    assert same(weights(learn.model), last), "no epoch was left to train, as after a checkpoint: nothing is loaded"

def test_every_epoch_and_the_last_one_can_be_saved(tmp_path):
    learn = scripted([2, 1, 0, 0, ml.CancelEpochException], path=tmp_path)
    learn.fit(5, cbs=ml.SaveModelCallback('score', every_epoch=2, fname='e'))
    assert {f.name for f in (tmp_path / 'models').iterdir()} == {'e_0.pth', 'e_2.pth'}, "epoch 4 was not completed"
    learn.fit(2, cbs=ml.SaveModelCallback('score', at_end=True, with_opt=True))
    state = torch.load(tmp_path / 'models/model.pth', weights_only=True)
    assert same(list(state['model'].values()), learn.scripted.weights[-1]), "at_end: the last weights, not the best"

class ThreeLayers(TinyRNN):
    def forward(self, x):
        pred, [h], _ = super().forward(x)
        return pred, [h * 5, h * 3, h], [h * 7, h * 4, h * 2], 'something more'

@pytest.mark.parametrize('n_steps', [1, 5])
def test_activations_and_their_changes_cost(n_steps):
    x, y, model = torch.randn(4, n_steps, 2), torch.ones(4, 1), ThreeLayers()
    learn = line_learner(ml.DataLoaders([(x, y)], device='cpu'), model, lr=0., cbs=ml.RNNRegularizer(2., 3.))
    learn.fit(1)
    copy.deepcopy(learn)    # fails if the callback still holds activations: they hold the graph
    with torch.no_grad():
        out, (*_, raw), (*_, h), _ = model(x)
        change = (raw[:, 1:] - raw[:, :-1]).pow(2).mean() if n_steps > 1 else 0     # one step has no change
        penalty, plain = float(2 * h.pow(2).mean() + 3 * change), F.mse_loss(out, y).item()
    assert learn.recorder.losses[0].item() == pytest.approx(plain + penalty), "of the last layer's two outputs"
    assert learn.validate(dl=[(x, y)])[0] == pytest.approx(plain), "in validation there is no penalty"

def run_11():
    (train, test), stop = ml.mnist1d(), ml.EarlyStoppingCallback(patience=3)
    noise = ml.before_batch_cb(lambda self, x, y: (x + 0.1 * torch.randn_like(x) if self.training else x, y))
    seed_cpu(0)
    model = mnist_mlp()
    dls = ml.DataLoaders.from_tensors(*train, valid=test, bs=250, device='cpu')
    with tempfile.TemporaryDirectory() as folder:
        learn = line_learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=ml.accuracy, path=folder)
        learn.fit(40, 2e-2, cbs=[noise, stop, ml.SaveModelCallback(), ml.TerminateOnNaNCallback])
        loss, accuracy = learn.validate()
    yield "epochs until it was stopped, of 40", len(learn.recorder.values), 8, 39
    yield "accuracy of the best weights", accuracy, 0.5, 0.7
    yield "their loss minus the best loss", loss - stop.best, -1e-6, 1e-6

def test_what_lesson_11_shows_on_mnist1d():
    assert_shown(run_11())

# =============================================================================================
lesson(12, "Mixed precision and checkpoints", tried=2, minutes=40, read="sections 15 and 16",
       goal="train with half the bits where these are enough, and go on after a crash as if nothing had happened",
       predict="what has to be in a file from which a training goes on to the very same bits? Write a list.",
       exercises={
           'MixedPrecision.before_batch': "torch.autocast for the type of device; enter it, keep it in learn.autocast",
           'MixedPrecision.after_loss': "leave the context by its __exit__, if there is one; learn.autocast is None",
           'CheckpointCallback.save': "save_state of a dict: all on your list, and self.plan; process 0 writes",
           'CheckpointCallback.go_on_from':
               "check that its plan is this one; put_state a copy of the loss function, then model and optimizer, then "
               "the loss itself; callbacks; frozen parameters; counts; `say` so; random numbers last, as others draw"})

def test_half_precision_is_for_prediction_and_loss_alone():
    model, inside, outside = nn.Linear(1, 1), set(), set()
    model.register_forward_hook(lambda model, args, pred: inside.add(pred.dtype))
    def look(self): outside.add((torch.is_autocast_enabled('cpu'), self.learn.autocast, self.learn.pred.dtype))
    learn = line_learner(model=model, cbs=ml.Callback(after_loss=look, before_step=look, after_batch=look))
    learn.to_bf16().fit(1)
    assert inside == {torch.bfloat16}, "the model computes in bfloat16"
    assert outside == {(False, None, torch.float32)}, "from the loss on, all is float32: autocast was left"
    assert model.weight.dtype == torch.float32, "small steps would vanish in half-precision weights"
    learn.to_fp32().fit(1)
    assert torch.float32 in inside, "to_fp32 goes back"

class Counts(ml.Callback):
    """Counts epochs, unfreezes in the second one, and is interrupted in epoch `stop`, as by Ctrl-C."""
    keeps = ('n',)

    def __init__(self, stop=None): self.stop, self.n = stop, torch.zeros(())

    def before_epoch(self):
        self.n += 1
        if self.epoch == 1: self.learn.unfreeze()

    def before_validate(self):
        if self.epoch == self.stop: raise KeyboardInterrupt

def checkpointed(path, n_epoch=5, stop=None, cbs=(), seed=0, bs=16, lr=0.01, every=1, resume=True, **kwargs):
    """A learner that has trained with a checkpoint, and was stopped in epoch `stop`, if one is given."""
    seed_cpu(seed)
    dls = ml.DataLoaders(ml.TensorLoader(*line_data(), bs=bs, shuffle=True), [line_data(24, 1)], device='cpu')
    loss = nn.MSELoss()     # it depends on how many batches it has seen
    loss.register_buffer('seen', torch.zeros(kwargs.pop('n_seen', ())))
    loss.register_forward_hook(lambda loss, args, out: out * (1 + loss.seen.add_(0.1 * torch.is_grad_enabled())))
    learn = line_learner(dls, **{'opt_func': functools.partial(ml.SGD, mom=0.9), 'splitter': lambda m: [[m.a], [m.b]],
                                 **kwargs}, loss_func=loss, path=path, cbs=[Counts(stop), *ml.listify(cbs)])
    learn.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        learn.fit(n_epoch, lr, cbs=ml.CheckpointCallback('run', every, resume))
    return learn

@pytest.mark.parametrize('every, stop', [(1, 2), (2, 4), (2, 1)])
def test_resumed_equals_uninterrupted(tmp_path, every, stop):
    whole, _ = checkpointed(tmp_path / 'whole'), checkpointed(tmp_path, stop=stop, every=every)
    assert (tmp_path / 'models/run.pth').exists() == (stop >= every), "an epoch that broke off is not saved"
    learn = checkpointed(tmp_path, every=every, seed=1 if stop >= every else 0)
    assert learn.start_epoch == stop // every * every, "it goes on after the last epoch that was saved"
    assert same(weights(learn.model), weights(whole.model)), "the same rows, frozen groups and loss: the same bits"
    assert str(learn.opt.state_dict()) == str(whole.opt.state_dict()), "the momentum goes on"
    assert learn.recorder.values == whole.recorder.values, "the history has the epochs from before"
    assert learn.train_iter == 20, "counts go on"
    assert learn.counts.n == 5, "so does what a callback names in `keeps`"
    learn.load('run', with_opt=False)       # the weights stand under 'model', where Learner.load looks

@pytest.mark.parametrize('other', [
    {'n_epoch': 6}, {'bs': 32}, {'cbs': [ml.GradientClip]}, {'n_seen': 2}, {'lr': 0.1},
    {'model': nn.Linear(1, 1), 'splitter': ml.trainable_params}])
def test_the_file_of_another_fit_is_refused_before_anything_changes(tmp_path, other):
    model = other.get('model', Line())
    before, _ = weights(model), checkpointed(tmp_path, stop=2)
    with pytest.raises(ValueError):
        checkpointed(tmp_path, **{'model': model, **other})
    assert same(weights(model), before), "refused before a weight changes"

def test_a_file_of_weights_is_no_checkpoint(tmp_path):
    checkpointed(tmp_path, 1).save('run')
    with pytest.raises(ValueError):
        checkpointed(tmp_path, 1)
    assert checkpointed(tmp_path, 1, resume=False).train_iter == 4, "resume=False replaces it"

def run_12():
    (train, test), found = ml.mnist1d(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, stop in [('one', None), ('two', 2), ('two', None)]:
            seed_cpu(0)
            dls = ml.DataLoaders.from_tensors(*train, valid=test, bs=256, device='cpu')
            model = nn.Sequential(nn.Flatten(), nn.Linear(40, 100), nn.ReLU(), nn.Dropout(0.1), nn.Linear(100, 10))
            learn = line_learner(dls, model, loss_func=nn.CrossEntropyLoss(), metrics=ml.accuracy, path=folder)
            with contextlib.suppress(KeyboardInterrupt):
                learn.to_bf16().fit_one_cycle(5, 2e-2, cbs=[Counts(stop), ml.CheckpointCallback(name)])
            found.append(learn.validate()[1])
    yield "accuracy in bfloat16", found[0], 0.4, 0.65
    yield "when it was stopped in the third epoch of five", found[1], 0.25, 0.6
    yield "gone on from there, minus the first", found[2] - found[0], 0., 0.

def test_what_lesson_12_shows_on_mnist1d():
    assert_shown(run_12())

# =============================================================================================
promises("Data and tools")

def test_small_tools():
    t = torch.zeros(5, 2)
    assert [ml.listify(o) for o in (None, [1], (1, 2), 'ab', 0)] == [[], [1], [1, 2], ['ab'], [0]]
    assert [ml.detuplify(t) for t in ((1,), (1, 2), ())] == [1, (1, 2), ()] and ml.tuplify(1) == ml.tuplify((1,))
    assert [ml.first_item(b) for b in (7, (7, 8), [{'a': (7,)}, 8], 'text', [], ((), 7))] == [7, 7, 7, 'text', [], ()]
    assert [ml.find_bs(b) for b in (t, [(t, 1)], {'a': t}, (torch.zeros(7), t))] == [5] * 3 + [7], \
        "the rows of the first tensor, however deeply it is nested"
    assert [ml.find_bs(b) for b in ((torch.tensor(3.), 'text'), (), {})] == [1] * 3, "without a shape, it is one row"

def test_tensors_move_and_are_detached(monkeypatch):
    t = torch.ones(2, requires_grad=True)
    moved = ml.to_device((t, [t]), 'meta')
    assert moved[0].is_meta and moved[1][0].is_meta and not t.is_meta
    cut = ml.to_detach((t * 2, {'k': t * 3}))
    assert not cut[0].requires_grad and not cut[1]['k'].requires_grad and cut[0].device.type == 'cpu'
    assert ml.to_detach(moved, cpu=False)[1][0].is_meta, "cpu=False: they stay where they are"
    assert [id(o) for o in ml.tensors_in({'a': [t, 'text'], 'b': (cut[0],)})] == [id(t), id(cut[0])]
    for cuda, mps, expected in [(True, True, 'cuda'), (False, True, 'mps'), (False, False, 'cpu')]:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        assert ml.default_device().type == expected, "CUDA, then MPS, then the CPU"
    monkeypatch.setattr(ml, 'default_device', lambda: torch.device('meta'))
    assert ml.to_device(t).is_meta, "without a device, to the best at hand"
    learn = types.SimpleNamespace(dl=types.SimpleNamespace(to_detach=lambda b, cpu, gather: (b, cpu, gather)))
    assert ml.to_detach_from_dl(learn, 7, gather=False) == (7, True, False), "the way of the loader itself wins"

def test_one_seed_decides_all_random_numbers(monkeypatch):
    import numpy
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', False)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    def draw(seed):
        ml.set_seed(seed)
        return random.random(), numpy.random.rand(), torch.rand(1).item()
    assert draw(7) == draw(7) and draw(2**40), "Python's, NumPy's and torch's; also seeds larger than NumPy's"
    assert torch.backends.cudnn.benchmark, "to do without costs speed, so only on demand:"
    ml.set_seed(1, reproducible=True)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark

def test_random_numbers_go_back_to_a_kept_state(monkeypatch):
    import numpy
    put_back, generator = [], torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: ['one state per device', 'of a larger machine'])
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', put_back.append)
    dls = ml.DataLoaders(DataLoader([1, 2], generator=generator, shuffle=True), device='cpu')
    def draw(): return random.random(), numpy.random.rand(), *torch.rand(1), *torch.rand(1, generator=generator)
    state, first = ml.rng_state(dls), draw()
    assert draw() != first, "reading the state stops nothing: the numbers go on"
    ml.set_rng_state(state, dls)
    assert draw() == first and put_back == [['one state per device']], "those of loaders and CUDA, too"

def test_parameters_by_kind():
    def ids(params): return {id(p) for p in params}
    model = small_net()
    model[0].bias.requires_grad_(False)
    assert ids(ml.trainable_params(model)) == ids(model.parameters()) - {id(model[0].bias)}
    norm = ids(model[1].parameters())
    assert ids(ml.norm_bias_params(model, with_bias=False)) == norm
    assert ids(ml.norm_bias_params(model)) == norm | {id(model[0].bias), id(model[3].bias)}, "also a frozen bias"
    assert len(ml.norm_bias_params(nn.LSTM(2, 2))) == 2, "bias_ih_l0 and bias_hh_l0 are biases, too"
    layers = nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.RMSNorm(2))
    assert len(ml.norm_bias_params(layers, False)) == 5, "they are norm layers, too"

def test_bad_data_is_refused():
    dls, x = ml.DataLoaders, torch.ones(8, 1)
    for what, bad in [('[8, 3] rows', lambda: ml.TensorLoader(x, torch.ones(3))),
                      ('bs=0', lambda: ml.TensorLoader(x, bs=0)),
                      ('valid_pct=1', lambda: dls.from_tensors(x, valid_pct=1)),
                      ('valid_pct=-0.1', lambda: dls.from_tensors(x, valid_pct=-0.1))]:
        with pytest.raises(ValueError, match=re.escape(what)):
            bad()
    for bad in ([None], [x], [iter([1])], [TensorDataset(x)], [[1], iter([1])], [[1], None, TensorDataset(x)]):
        with pytest.raises(TypeError, match='loader'):
            dls(*bad)    # a data set would train sample by sample, an iterator for one epoch

def test_dataloaders_name_their_parts():
    dls, extra = line_dls(path='here', vocab=['a', 'b']), [1]
    assert dls[0] is dls.train and dls[1] is dls.valid and str(dls.path) == 'here' and dls.vocab == ['a', 'b']
    assert dls.train_ds is dls.train.dataset and dls.valid_ds is dls.valid.dataset
    assert dls.bs == 16 and not hasattr(dls, 'nothing'), "what DataLoaders lacks is read from the training loader"
    three = ml.DataLoaders([], None, extra, device='cpu')
    assert three[2] is extra and three.valid is None and three.valid_ds is None, "dls[2] may be a test set"
    for dup in (copy.copy(dls), copy.deepcopy(dls), pickle.loads(pickle.dumps(dls))):
        assert len(dup.train) == 4, "copy and pickle skip __init__: the copy must still have its loaders"

def test_from_tensors_takes_arrays_lists_and_tuples():
    import numpy
    x, y = numpy.ones((8, 2)), numpy.arange(8)
    dls = ml.DataLoaders.from_tensors((x, x), y, valid_pct=0.5, bs=2, device='cpu')
    (a, b), (target,) = dls.split_batch(dls.one_batch())
    assert a.shape == b.shape == (2, 2) and a.dtype == torch.float32, "NumPy's own default, float64, becomes torch's"
    assert dls.n_inp == 2 and target.dtype == torch.int64, "two inputs, one target; classes stay integers"
    dls = ml.DataLoaders.from_tensors([[1.], [2.]], torch.ones(2).double(), valid=([[3.]], [3.]), device='cpu')
    assert dls.train_ds.tensors[0].shape == (2, 1) and dls.n_inp == 1, "a list is one array; tuples are several"
    assert dls.train_ds.tensors[1].dtype == torch.float64 and len(dls.valid_ds) == 1, "tensors keep their type"
    dls = ml.DataLoaders.from_tensors(torch.ones(4, 1), valid=torch.zeros(2, 1), n_inp=2, device='cpu')
    assert len(dls.valid_ds) == 2 and dls.n_inp == 2, "without targets, as for an autoencoder"

def test_from_tensors_splits_once_and_for_all():
    x = torch.arange(50.)
    def split(seed, **kwargs):
        dls = ml.DataLoaders.from_tensors(x, x, seed=seed, device='cpu', **kwargs)
        return dls.train_ds.tensors[0], dls.valid_ds.tensors[0]
    train, valid = split(1)
    assert len(train) == 40 and torch.cat([train, valid]).sort().values.equal(x), "a fifth validates"
    assert len(split(1, valid_pct=0.3)[0]) == 35
    assert split(1)[1].equal(valid) and not split(2)[1].equal(valid), "the seed decides"

def test_from_tensors_options():
    x, y = line_data(10)
    dls = ml.DataLoaders.from_tensors(x, y, valid=(x[:5], y[:5]), bs=4, drop_last=True, device='cpu')
    assert len(dls.train) == 2 and len(dls.valid) == 2 and dls.train.shuffle and not dls.valid.shuffle, \
        "shuffle and drop_last are for training: validation needs every row, in order"
    dls = ml.DataLoaders.from_tensors(x, y, valid_pct=0, shuffle=False, device='meta')
    assert dls.valid is None and not dls.train.shuffle and dls.train.bs == 64 and dls.train_ds.tensors[0].is_meta

def test_from_dsets_knows_whose_keywords_are_whose():
    data = TensorDataset(*line_data(65))
    dls = ml.DataLoaders.from_dsets(data, data, drop_last=True, vocab='ab', timeout=0, device='meta')
    assert [len(dls.train), len(dls.valid)] == [1, 2] and dls.vocab == 'ab', "64 rows in each; validation loses none"
    assert isinstance(dls.train.sampler, torch.utils.data.RandomSampler) and dls.device.type == 'meta'
    assert isinstance(dls.valid.sampler, torch.utils.data.SequentialSampler), "validation keeps the order"
    few = ml.DataLoaders.from_dsets(data, data, sampler=[0, 1], device='cpu')
    assert list(few.train.sampler) == [0, 1] and sum(len(x) for x, _ in few.valid) == 65, "it sees every row"
    dls = ml.DataLoaders.from_dsets(data, shuffle=False)
    assert dls.valid is None and isinstance(dls.train.sampler, torch.utils.data.SequentialSampler)
    rows = type('Rows', (IterableDataset,), {'__iter__': lambda self: iter(data)})()
    assert len(list(ml.DataLoaders.from_dsets(rows, bs=60).train)) == 2, "whose order nobody can shuffle"

def test_to_moves_the_tensors_of_memory_and_the_batches():
    dls = ml.DataLoaders(ml.TensorLoader(torch.ones(2)), [torch.ones(2)], device='cpu')
    assert dls.to('meta') is dls and dls.device == torch.device('meta') and dls.train_ds.tensors[0].is_meta
    dls = ml.DataLoaders([torch.ones(2)], device='meta')
    assert dls.one_batch().is_meta, "a list stays where it is; each of its batches moves"
    assert dls.cpu().device.type == 'cpu'

def test_targets_are_decoded():
    dls = ml.DataLoaders([], vocab=['cat', 'dog'], device='cpu')
    assert dls.decoded(torch.tensor(1)) == 'dog' and dls.decoded(0) == 'cat', "a class number is a place in the vocab"
    assert type(dls.decoded(torch.tensor(2.5))) is float and dls.decoded(torch.ones(2)).shape == (2,), "nothing else is"
    dls.decode = lambda y: f'<{y}>'
    assert dls.decoded(3) == '<3>', "decode wins over vocab"

def test_show_batch_draws_what_a_person_reads():
    import matplotlib.pyplot as plt
    x, y = torch.rand(20, 1, 40), torch.arange(20) % 10
    dls = ml.DataLoaders.from_tensors(x, y, vocab='abcdefghij', shuffle=False, valid_pct=0, device='cpu')
    axs = dls.show_batch(max_n=3)
    assert [len(ax.lines) for ax in axs.flat if ax.get_visible()] == [1] * 3, "a signal is a line"
    assert [ax.get_title() for ax in axs.flat] == ['a', 'b', 'c', ''], "a class has its name, not its number"
    for images in (torch.rand(3, 3, 8, 8), (torch.rand(3, 8, 8), 'second input')):
        axs = ml.show_samples(images)
        assert [len(ax.images) for ax in axs.flat] == [1, 1, 1, 0] and axs.shape == (2, 2)
    plt.close('all')

def test_mnist1d_is_as_documented_and_the_same_as_ever():
    state = torch.random.get_rng_state()
    (x, y), (xt, yt) = ml.mnist1d()
    assert torch.random.get_rng_state().equal(state), "its own generator, not the global one"
    assert x.shape == (4000, 1, 40) and xt.shape == (1000, 1, 40) and x.dtype == torch.float32
    assert y.dtype == torch.int64 and torch.cat([y, yt]).bincount().tolist() == [500] * 10, "classes of equal size"
    both = torch.cat([x, xt])
    assert both.mean().abs() < 1e-5 and both.std().item() == pytest.approx(1, abs=1e-3), "normalized over all rows"
    (x, y), (xt, yt) = ml.mnist1d(50, seed=0)      # the same signals, else results are no longer comparable
    assert not ml.mnist1d(50, seed=1)[0][0].equal(x), "the seed decides which signals come"
    assert y[:10].tolist() == [4, 9, 7, 6, 7, 9, 1, 7, 3, 0] and yt.tolist() == [8, 2, 5, 0, 0, 5, 4, 3, 5, 6]
    assert x[0, 0, ::5].tolist() == pytest.approx([-0.137, -1.101, 0.089, 0.8, -1.671, -0.581, 0.46, 0.382], abs=2e-3)
    assert xt[-1, 0, :30:5].tolist() == pytest.approx([-0.976, 0.027, 0.442, -0.244, -2.73, -0.346], abs=2e-3)

# =============================================================================================
promises("The loop, callbacks and the Learner")

KINDS = {'batch': ml.CancelBatchException, 'step': ml.CancelStepException,
         'backward': ml.CancelBackwardException, 'train': ml.CancelTrainException,
         'validate': ml.CancelValidException, 'epoch': ml.CancelEpochException,
         'fit': ml.CancelFitException, 'error': ValueError, 'ctrl-c': KeyboardInterrupt}

@pytest.mark.parametrize('first, second, raised', [
    (ValueError('1'), KeyError('2'), ValueError), (ValueError('1'), ml.CancelFitException(), ValueError),
    (ml.CancelFitException(), KeyError('2'), KeyError), (ml.CancelFitException(), ml.CancelTrainException(), None),
    (ml.CancelTrainException(), ml.CancelFitException(), None)])
def test_of_two_exceptions_the_one_that_ends_more_counts(first, second, raised):
    learn = line_learner(cbs=ml.Callback(after_loss=raising(first), after_batch=raising(second)))
    with pytest.raises(raised) if raised else contextlib.nullcontext() as info:
        learn.fit(2)
    assert learn.epoch == 0, "a fit that was to end does not go on"
    if raised is ValueError:
        assert any(repr(second) in note for note in info.value.__notes__), "the other one becomes a note"

@pytest.mark.parametrize('part', list(KINDS)[:7])
def test_in_after_events_a_callback_knows_how_the_part_ended(part):
    seen = []
    note = ml.Callback(**{f'after_{part}': lambda self: seen.append((self.completed, self.learn.failed))})
    line_learner(cbs=note).fit(1)
    assert set(seen) == {(True, False)}
    for error, failed in [(KINDS[part], False), (ZeroDivisionError, True), (KeyboardInterrupt, True)]:
        seen.clear()
        with contextlib.suppress(error), warnings.catch_warnings(action='ignore'):
            line_learner(cbs=[ml.Callback(**{f'before_{part}': raising(error)}), note]).fit(1)
        assert set(seen) == {(False, failed)}, "failed: by an error, not its own Cancel"

def test_the_note_on_an_error_says_where_and_with_what():
    learn = line_learner()
    learn.one_batch(3, line_data(4))
    shapes = ', '.join(['(4, 1) torch.float32'] * 3)
    assert ml.where(learn) == f'in epoch 0, validation batch 3: xb, yb, pred: {shapes}'

@pytest.mark.parametrize('wrong, near', [('after_bacth', 'after_batch'), ('begin_fit', 'before_fit')])
def test_a_misspelt_event_is_an_error_with_the_nearest_name(wrong, near):
    for misspell in (lambda: type('Wrong', (ml.Callback,), {wrong: print}), lambda: ml.Callback(**{wrong: print}),
                     lambda: line_learner()(wrong)):
        with pytest.raises(AttributeError, match=f"{wrong}.*did you mean '{near}'"):
            misspell()

def test_reading_delegates_to_learner_and_model_writing_does_not(recwarn):
    class Tst(ml.Callback):
        def call_me(self): return 'maybe'
        def before_fit(self): self.tst = 1      # under its own name: it hides nothing but itself
    learn = line_learner(cbs=Tst)
    learn.mine = 7
    learn.fit(1)
    assert learn.tst.mine == 7 and learn.tst.a is learn.model.a
    assert Tst()('call_me') == 'maybe' and learn.tst('fit') is None, "methods of its own, not the learner's"
    learn.tst.other = learn.tst.run_train = 1
    assert not recwarn.list
    for name in ('mine', 'fit', 'lr'):      # of the learner or its class
        with pytest.warns(UserWarning, match=rf'shadowing an attribute \({name}\).*self.learn.{name}'):
            setattr(learn.tst, name, 8)
    learn.tst.mine = 9
    assert learn.mine == 7 and learn.tst.mine == 9 and not recwarn.list, "it is said once"

def test_callbacks_and_learners_copy_and_pickle():
    cb = pickle.loads(pickle.dumps(ml.Callback(before_batch=ml.detuplify)))
    assert cb.before_batch.args == (cb,), "bound to the copy, not to the original"
    learn = line_learner()
    learn.fit(1)
    learn.logger = print        # a lambda cannot be pickled
    dups = [copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))]
    for o in (learn, *dups):
        with o.no_logging(), o.no_bar():
            o.fit(1)
        assert o.train_eval.learn is o and same(weights(o.model), weights(learn.model)), "a copy goes on alike"
    assert dups[0].model is not learn.model and not hasattr(ml.Learner.__new__(ml.Learner), 'anything'), "no recursion"

def test_handlers_and_flags_may_change_at_any_time():
    seen, cb = [], ml.Callback()
    class EverySecond(ml.Callback):
        run_train = property(lambda self: self.train_iter % 2 == 0)
        def before_batch(self): seen.append(self.training)
    class Gone(ml.Callback): before_batch = raising(AssertionError("it is removed before its turn"))
    class Remover(ml.Callback):
        order = -5
        def before_batch(self): self.learn.remove_cb(Gone)
    learn = line_learner(cbs=[EverySecond, cb])
    cb.before_fit = lambda: seen.append('fit')
    learn.fit(1, cbs=[Gone, Remover])
    assert seen == ['fit', True, True, False, False], "a handler set later is found; flags are read each time"

def test_callbacks_are_registered_and_removed():
    class Other(ml.Callback): pass
    log, other, learn = EventLog(), Other(), line_learner()
    learn.cbs = [ml.TrainEvalCallback, log]
    assert learn.cbs == [learn.train_eval, log] and log.learn is learn, "each becomes learn.<name>"
    assert learn.add_cb(other) is learn and learn.cbs[-1] is other and len(learn.add_cb(other).cbs) == 3
    assert learn.remove_cbs([ml.TrainEvalCallback, other]) is learn, "by class or by object"
    assert learn.cbs == [log] and other.learn is None and not hasattr(learn, 'train_eval')
    with pytest.raises(ZeroDivisionError), learn.added_cbs([other, log]):
        assert learn.cbs == [log, other]
        1 / 0
    assert learn.cbs == [log]
    before, late = list(learn.add_cbs([other, ml.Callback]).cbs), ml.TrainEvalCallback()
    with learn.removed_cbs([log, other]):
        assert learn.add_cb(late).remove_cb(before[2]).cbs == [late]
    assert learn.cbs == [log, other, late], "back to their old places; what was taken out meanwhile stays out"
    assert learn.remove_cb(ml.Callback).cbs == [], "all are of that class"
    line_learner(cbs=other), learn.add_cb(other), (second := line_learner(cbs=other))
    assert other.learn is second and other not in learn.cbs, "a callback serves one learner, the last one"

def test_names_of_callbacks_must_be_free():
    class Progress(ml.Callback): pass
    learn, both = line_learner(), [Progress(), Progress()]
    learn.cbs = both
    assert learn.progress is both[1], "those of one class may share a name; the newest has it"
    local = [type('TstCallback', (ml.Callback,), {'__qualname__': '<locals>.Tst'}) for _ in range(2)]
    taken = [type(name, (ml.Callback,), {}) for name in ('AddCbCallback', 'Model')]      # of the class, of the object
    for bad in (taken[:1], taken[1:], local, [ml.ProgressCallback]):
        with pytest.raises(ValueError, match='taken; rename its class'):
            learn.add_cbs([EventLog, *bad])
    with pytest.raises(TypeError, match='is not a Callback'):
        learn.add_cbs([EventLog, 3])
    assert learn.cbs == both, "all or none"

def test_a_class_that_a_notebook_defines_again_replaces_the_old_one():
    def cell(): return type('Tst', (ml.Callback,), {'__module__': '__main__'})
    new = cell()
    learn = line_learner(cbs=cell()).add_cb(new)
    assert [type(cb) for cb in learn.cbs if cb.name == 'tst'] == [new], "not both"
    assert not hasattr(learn.remove_cb(cell()), 'tst'), "and it is found under a third definition"

def test_the_loop_can_be_shown(capsys):
    learn = line_learner()
    learn.cbs = [ml.TrainEvalCallback]
    learn.show_training_loop()
    shown = capsys.readouterr().out
    assert shown.startswith('Start Fit\n   - before_fit     : [TrainEvalCallback]\n  Start Epoch Loop')
    assert re.findall(r'- (\w+) *: \[', shown) == list(ml.EVENTS[1:]) and len(ml.EVENTS) == 24

def test_a_new_learner_is_at_rest(tmp_path):
    dls = line_dls(path=tmp_path)
    dls.train_ds.loss_func = F.l1_loss
    learn = ml.Learner(dls, Line())
    assert learn.loss_func is F.l1_loss and learn.lr == ml.defaults.lr == 1e-3
    assert learn.path == tmp_path and learn.epoch == learn.iter == learn.n_iter == learn.pct_train == 0
    assert learn.x is learn.y is learn.pred is learn.opt is None and not learn.training and learn.logger is print
    assert [type(cb) for cb in line_learner(cbs=EventLog).cbs] == [*ml.defaults.callbacks, EventLog]
    assert [type(cb) for cb in line_learner(cbs=EventLog, default_cbs=False).cbs] == [EventLog]

def test_what_a_learner_lacks_is_looked_up_in_its_model():
    learn = line_learner(model=nn.Sequential(nn.Linear(1, 1)))
    learn.model.own = 3
    assert learn.own == 3 and not hasattr(learn, '__len__'), "but not what Python asks for itself"
    with pytest.raises(AttributeError, match='fit_one_cycle'):
        learn.fit_one_cyle(1)

def test_bad_input_is_refused_before_anything_changes():
    good = dict(dls=line_dls(), model=Line(), loss_func=F.mse_loss)
    for match, bad in [('use DataLoaders', dict(dls=[1, 2])), ('model=.*Line.*give an object', dict(model=Line)),
                       ('model=<function', dict(model=lambda x: x)), ('loss_func=None.*MSELoss', dict(loss_func=None)),
                       ('loss_func=.*MSELoss', dict(loss_func=nn.MSELoss)),
                       ('opt_func=.*give, say, SGD', dict(opt_func=ml.SGD([torch.ones(1)], 0.1))),
                       ('is not a Callback', dict(cbs=print))]:
        with pytest.raises(TypeError, match=match):     # easily mixed up
            ml.Learner(**{**good, **bad})
    learn = line_learner()
    for bad in (dict(lr=-1), dict(lr='fast'), dict(wd=-1), dict(lr=slice(-1, 1)), dict(lr=[0.1, 0.2])):
        with pytest.raises(ValueError):
            learn.fit(1, **bad)
    assert same(weights(learn.model), weights(Line())), "all was refused before the first step"

def test_model_and_loss_move_to_the_device_of_the_data():
    dls, moved = ml.DataLoaders([], device='meta'), []
    class Loss(nn.MSELoss):
        def to(self, device): moved.append(device)
    learn = line_learner(dls, loss_func=Loss())
    assert learn.ensure_opt() and learn.model.a.is_meta, "before the optimizer makes its state"
    learn.model = Line()
    learn('before_fit')
    assert learn.model.a.is_meta and moved == [dls.device] and learn.loss.item() == 0

def test_a_compiled_model_trains_alike():
    learn, compiled = line_learner(), line_learner(model=torch.compile(Line(), backend='eager'))
    learn.fit(1)
    compiled.fit(1)
    assert same(weights(learn.model), weights(compiled.model))

def test_a_rate_of_the_opt_func_wins():
    learn = line_learner(opt_func=functools.partial(ml.SGD, lr=0.3), lr=0.1)
    with pytest.warns(UserWarning, match='lr=0.1 is not used: opt_func has its own, 0.3'):
        learn.fit(1)
    assert learn.opt.hypers[0]['lr'] == learn.lr == 0.3

def test_biases_and_norm_layers_decay_only_on_demand():
    def marks(**kwargs):
        learn = line_learner(model=small_net(), **kwargs)
        return [learn.ensure_opt().state[p].get('do_wd', True) for p in learn.model.parameters()]
    assert marks() == [True, False, False, False, True, False] and marks(wd_bn_bias=True) == [True] * 6
    bare = line_learner(opt_func=functools.partial(ml.Optimizer, cbs=[ml.weight_decay, ml.sgd_step]))
    bare.fit(1, wd=0.3)
    bare.fit(1)
    assert bare.opt.hypers[0]['wd'] == 0, "an optimizer that declares none has none, but in the fit that gives it"

def test_the_optimizer_is_that_of_the_model():
    learn = line_learner()
    learn.training = True
    learn.one_batch(0, line_data(4))
    assert learn.model.a.item() != 0.5, "one batch, by hand: the optimizer is made when it is needed"
    learn.model.a.requires_grad_(False)
    learn.fit(1, reset_opt=True)
    learn.model.a.requires_grad_(True)
    before, opt = learn.model.a.item(), learn.opt
    learn.fit(1)
    assert learn.opt is not opt and learn.model.a.item() != before, "what was thawed by hand trains"
    opt, learn.model = learn.opt, Line()
    learn.fit(1)
    assert learn.opt is not opt and learn.model.a.item() != 0.5, "the old one would train parameters nobody uses"
    learn.opt = opt = ml.SGD([[learn.model.a], [learn.model.b]], lr=[0.1, 0.2])
    learn.fit(1)
    assert learn.opt is opt and [h['lr'] for h in opt.hypers] == [0.1, 0.2], "one of your own stays, and its rates"

class TakesKeywords(nn.Module):
    """Returns what has `logits`: an object, or a dict."""
    def __init__(self, output):
        super().__init__()
        self.lin, self.output = nn.Linear(4, 3), output

    def forward(self, input_ids, mask): return self.output(logits=self.lin(input_ids * mask))

@pytest.mark.parametrize('kind, output', [(dict, types.SimpleNamespace), (collections.UserDict, dict)])
def test_dict_batches_work_from_end_to_end(kind, output):
    rng = torch.Generator().manual_seed(0)
    data = [kind({'input_ids': torch.randn(8, 4, generator=rng), 'mask': torch.ones(8, 4),
                  'labels': torch.randint(3, (8,), generator=rng)}) for _ in range(4)]
    dls = ml.DataLoaders(data, data, targets='labels', vocab='abc', device='cpu')
    learn = line_learner(dls, TakesKeywords(output), loss_func=F.cross_entropy, metrics=ml.accuracy)
    learn.fit(3)
    inputs, preds, targs = learn.get_preds(with_input=True)
    assert preds.shape == (32, 3) and targs.shape == (32,) and inputs['mask'].shape == (32, 4)
    assert learn.validate()[1] == pytest.approx(ml.accuracy(preds, targs).item()), "metrics see logits, too"
    full, decoded, probs = learn.predict({k: v[0] for k, v in data[0].items()})
    assert torch.allclose(probs, preds[0]) and full == 'abc'[decoded], "an item is a dict; its target does no harm"
    assert dls.show_batch(1).size == 1, "the first input is drawn"

def test_a_tiny_transformer_trains_as_it_comes():
    transformers = pytest.importorskip('transformers')
    seed_cpu(0)
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=16, max_position_embeddings=8, num_labels=2)
    ids = torch.randint(2, 20, (32, 6))
    data = [transformers.BatchEncoding({'input_ids': x, 'labels': (x[:, 0] > 10).long()}) for x in ids.split(8)]
    learn = line_learner(ml.DataLoaders(data, data, targets='labels', device='cpu'),
                         transformers.BertForSequenceClassification(config), loss_func=nn.CrossEntropyLoss(), lr=1e-2)
    before = learn.validate()[0]
    learn.fit(5)
    assert learn.get_preds()[0].shape == (32, 2) and learn.validate()[0] < before, "no wrapper, no collator"

# =============================================================================================
promises("Metrics, recorder, progress")

class Largest:
    """An object as in torchmetrics: the largest prediction of a pass."""
    graphs = False
    def reset(self): self.values = []
    def compute(self): return max(self.values)
    def update(self, pred, target):
        self.values.append(pred.max().item())
        self.graphs |= pred.requires_grad

def test_metrics_are_functions_objects_or_classes_with_names():
    class Half:
        def __call__(self, pred, target): return 0.5
    made = [ml.mk_metric(m) for m in (ml.AvgLoss, functools.partial(ml.accuracy, axis=0), Half(), nn.MSELoss(),
                                      Largest, ml.ValueMetric(lambda: 7, 'seven'), ml.ValueMetric(lambda: 7))]
    assert [m.name for m in made] == ['loss', 'accuracy', 'half', 'mse_loss', 'largest', 'seven', '<lambda>'], \
        "functions have their own names, objects that of their class"
    own = type('Own', (Largest, ml.Metric), {})()
    assert all(ml.mk_metric(m) is m for m in [*made, own]) and made[5].value == 7, "a Metric is taken as it is"
    def vector(pred, y): return (pred - y).flatten()[:3]
    for bad, match in (('acc', "metric 'acc'"), (vector, "metric 'vector'.*not one number")):
        with pytest.raises(TypeError, match=match):
            line_learner(metrics=bad).fit(1)
    assert ml.error_rate(torch.eye(4), torch.tensor([0, 1, 1, 3])) == 0.25, "an error is a wrong answer"

def test_means_of_numbers_of_any_kind_and_of_half_precision():
    for value in (2, torch.tensor(2), __import__('numpy').float64(2), torch.tensor(40., dtype=torch.float16)):
        metric = ml.AvgMetric(lambda pred, y: value)
        for n in [300] * 8 + [2]:       # float16 ends at 65504
            metric.accumulate(measured(None, torch.ones(n)))
        assert metric.value == value and metric.count == 2402
    metric = ml.AvgMetric(lambda pred, texts: len(texts))
    for texts in (['a', 'b', 'c'], ['d']):
        metric.accumulate(types.SimpleNamespace(xb=(torch.ones(len(texts)),), pred=None, yb=(texts,)))
    assert metric.value == 2.5, "if the targets are no tensor, the inputs tell how many there are"

def test_objects_with_update_compute_and_reset_see_a_whole_pass():
    largest = Largest()
    largest.to = lambda device: setattr(largest, 'device', device)
    learn = line_learner(metrics=largest)
    learn.recorder.train_metrics = True
    learn.fit(2)
    assert learn.final_record[-1] == pytest.approx(learn.model(line_data(24, 1)[0]).max().item())
    assert len(largest.values) == 2, "reset before each pass"
    assert largest.device == learn.dls.device and not largest.graphs, "it follows the batch, and keeps no graph"

@pytest.mark.parametrize('options, names', [
    ({}, ['epoch', 'train_loss', 'valid_loss', 'l1_loss', 'loss', 'time']),
    ({'train_metrics': True, 'add_time': False},
     ['epoch', 'train_loss', 'train_l1_loss', 'train_loss', 'valid_loss', 'valid_l1_loss', 'valid_loss']),
    ({'valid_metrics': False}, ['epoch', 'train_loss', 'valid_loss', 'time'])])
def test_titles_tell_what_a_row_holds(options, names):
    learn = line_learner()
    learn.cbs = [ml.TrainEvalCallback, ml.Recorder(**options)]
    learn.metrics = [F.l1_loss, ml.AvgLoss]     # looked up when a fit begins
    learn.fit(1)
    assert learn.recorder.metric_names == names and len(learn.recorder.log) == len(names), "a title for each cell"

def test_the_smoothed_loss_goes_on_through_the_epochs_and_metrics_begin_anew():
    learn = line_learner(loss_func=lambda pred, y: pred.mean() * 0 + learn.epoch)
    learn.recorder.beta, learn.recorder.train_metrics = 0.5, True
    learn.metrics = lambda pred, y: float(learn.epoch)
    learn.fit(2)
    assert learn.final_record == pytest.approx([sum(0.5**i for i in range(1, 5)) / (1 - 0.5**8), 1, 1, 1])

def test_cancelled_batches_are_in_no_mean_and_cancelled_or_empty_passes_leave_none():
    learn = line_learner(metrics=F.l1_loss)
    for training, n_losses, n_valid in ((True, 3, 24), (False, 4, 8)):
        learn.fit(1, cbs=RaiseAt('after_loss', ml.CancelBatchException(), training))
        assert len(learn.recorder.losses) == n_losses and learn.recorder.valid_mets[1].count == n_valid
    for error in (ml.CancelValidException(), KeyboardInterrupt()):
        with contextlib.suppress(KeyboardInterrupt):
            learn.fit(2, cbs=RaiseAt('before_validate', error))
        assert learn.recorder.values[0][0] is not None and learn.recorder.values[0][1:] == [None, None]
        assert len(learn.recorder.values) == (1 if learn.failed else 2), "what was complete survives Ctrl-C"
    learn.fit(1, cbs=RaiseAt('after_loss', ml.CancelTrainException()))
    assert learn.final_record[0] is None and None not in learn.final_record[1:]
    learn.dls.train, learn.dls.valid = Stream(), []
    learn.fit(1, cbs=[ml.GradientAccumulation(100), RaiseAt('before_step', ml.CancelStepException())])
    assert learn.final_record[0] is not None, "a pass whose last step, after its last batch, was cancelled is complete"
    assert learn.final_record[1:] == [None, None], "over no samples there is no mean: neither 0 nor an error"

def test_training_nothing_is_not_silent():
    for train in ([], [line_data(4)[0]]):       # no batch; no target
        with pytest.warns(UserWarning, match='nothing was trained'):
            line_learner(ml.DataLoaders(train, device='cpu')).fit(1)

@needs_cuda
def test_training_on_cuda_without_a_single_wait():
    learn = line_learner(line_dls(device='cuda'), metrics=F.l1_loss)
    learn.fit(1)
    strict, free = (lambda self, mode=mode: torch.cuda.set_sync_debug_mode(mode) for mode in ('error', 'default'))
    learn.fit(2, cbs=ml.Callback(before_batch=strict, after_train=free, after_validate=free))
    assert next(learn.model.parameters()).is_cuda and learn.recorder.losses[0].is_cuda

def shown(learn, n_epoch=2, is_terminal=False):
    """What a fit has printed at each flush; each reading of the clock is 0.04 s later."""
    clock, screen, flushed = iter(range(10**6)), io.StringIO(), []
    screen.isatty, screen.flush = lambda: is_terminal, lambda: flushed.append(screen.getvalue())
    learn.logger = print
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(screen):
        patch.setattr(ml.time, 'perf_counter', lambda: next(clock) * 0.04)
        learn.fit(n_epoch)
    assert learn.logger is print, "after the fit all is as before"
    return flushed

def test_a_log_file_gets_an_aligned_table():
    def a_name_longer_than_its_numbers(pred, y): return torch.full((1, 1), 0.5)
    *_, text = shown(line_learner(metrics=[lambda pred, y: 1e12, a_name_longer_than_its_numbers]))      # seen at once
    ends = [[word.end() for word in re.finditer(r'\S+', line)] for line in text.splitlines()]
    assert len(ends) == 3 and ends[0] == ends[1] == ends[2], "titles, two rows; each column ends like its title"
    assert text.splitlines()[1].startswith('    0  ') and not re.search(' \n|\r', text), "epochs are narrow; no bar"

@pytest.mark.parametrize('place', ['terminal', 'notebook'])
def test_terminals_and_notebooks_get_a_bar_that_moves_in_place(place, monkeypatch):
    if place == 'notebook':
        monkeypatch.setitem(sys.modules, 'ipykernel', types.ModuleType('ipykernel'))
    learn = line_learner(ml.DataLoaders([line_data(4)] * 40, [line_data(4)] * 40, device='cpu'))
    flushed = shown(learn, 1, is_terminal=place == 'terminal')
    text = flushed[-1]
    bars = re.findall('(epoch 1/1 .*?)\r', text)
    assert re.match(r'epoch 1/1 batch 3/40 loss \d+\.\d{4} +$', bars[0]), "counted from 1, with the loss"
    assert 10 < len(bars) == len(flushed) - 2 < 60, "at most ten times a second"
    lines = [line.split('\r')[-1] for line in text.split('\n')]
    assert [line.split()[:1] for line in lines] == [['epoch'], ['0'], []], "at the end, only the table is left"
    assert len(lines[1]) >= max(map(len, bars)), "the row covers the bar"

def test_others_get_rows_and_nothing_is_printed(capsys):
    rows, learn = [], line_learner()
    learn.logger = rows.append
    learn.fit(2)
    with learn.no_logging():
        learn.fit(1)
    assert len(rows) == 2 and capsys.readouterr().out == '', "a logger of one's own, or none"
    learn.logger = print
    for quiet in (learn.no_bar, learn.no_mbar):
        with quiet():
            learn.fit(1)
        assert re.fullmatch(r"\[0, \d+\.\d+, \d+\.\d+, '\d\d:\d\d'\]\n", capsys.readouterr().out), "rows as they are"

def test_cells_and_times(monkeypatch):
    clock, times, took, learn = [0.], [], iter((5, 59.6, 754, 3725)), line_learner()
    monkeypatch.setattr(ml.time, 'perf_counter', lambda: clock[0])
    learn.logger = lambda row: times.append(row[-1])
    learn.fit(4, cbs=ml.Callback(after_validate=lambda self: clock.insert(0, clock[0] + next(took))))
    assert times == ['00:05', '01:00', '12:34', '1:02:05']
    cells = [ml.format_cell(*cell) for cell in ((0.5, 10), (12.5, 9), (1e12, 10), (math.nan, 5), (3, 5), (None, 4))]
    assert cells == ['  0.500000', '12.500000', '  1.00e+12', '  nan', '    3', '    ']

# =============================================================================================
promises("Schedules, lr_find and pictures")

@pytest.mark.parametrize('make, formula', [
    (ml.SchedLin, lambda s, e, pos: s + (e - s) * pos), (ml.SchedNo, lambda s, e, pos: s),
    (ml.SchedExp, lambda s, e, pos: s * (e / s)**pos),
    (ml.SchedCos, lambda s, e, pos: s + (1 - math.cos(math.pi * pos)) * (e - s) / 2),
    (functools.partial(ml.SchedPoly, power=3), lambda s, e, pos: s + (e - s) * pos**3),
    (ml.annealer(lambda s, e, pos: s - pos), lambda s, e, pos: s - pos)])
def test_every_schedule_hits_its_values_for_one_group_and_for_two(make, formula):
    for pos in (0, 0.2, 0.5, 1):
        assert make(1., 3.)(pos) == pytest.approx(formula(1., 3., pos))
        for start, end in (([1., 3.], (3., 2.)), ((1., 3.), [3., 2.])):
            assert make(start, end)(pos) == pytest.approx([formula(1., 3., pos), formula(3., 2., pos)])

def test_several_schedules_make_one_history_of_the_last_fit():
    learn = line_learner(cbs=ml.ParamScheduler({'wd': ml.SchedNo(0.5, 0.5)}))
    learn.fit_one_cycle(1)
    assert set(learn.recorder.hps) == {'wd', 'lr', 'mom'} and learn.recorder.hps['lr'] == learn.recorder.lrs
    learn.fit(2)
    assert learn.recorder.hps == {'wd': [0.5] * 8}

def test_a_schedule_that_cannot_be_played_is_refused_before_the_first_step():
    learn = line_learner(splitter=lambda model: [[model.a], [model.b]])
    for scheds, match in [({'momentun': ml.SchedNo(1, 1)}, "no hyper 'momentun'"),
                          ({'mom': ml.SchedNo([1, 1, 1], [1, 1, 1])}, '^mom=.*3 values for 2')]:
        with pytest.raises(ValueError, match=match):
            learn.fit(1, cbs=ml.ParamScheduler(scheds))
    learn.dls.train = Stream()
    with pytest.raises(ValueError, match=r'needs len\(dls.train\)'):
        learn.fit_one_cycle(1)
    assert same(weights(learn.model), weights(Line()))
    learn = line_learner(opt_func=functools.partial(ml.Optimizer, cbs=ml.sgd_step))
    learn.fit_one_cycle(1)
    assert len(learn.recorder.hps['mom']) == 4, "mom may be added for optimizers without, and does nothing"

@pytest.mark.parametrize('opt_func', [None, torch.optim.AdamW])
def test_lr_find_then_fit_equals_fit(opt_func):
    def run(find):
        ml.set_seed(0)
        data, generator = TensorDataset(*class_batches(1, 40)[0]), torch.Generator().manual_seed(5)
        dls = ml.DataLoaders(DataLoader(data, 8, shuffle=True, generator=generator), class_batches(1), device='cpu')
        learn = line_learner(dls, small_net(), loss_func=F.cross_entropy, opt_func=opt_func, lr=0.01)
        learn.model.insert(1, nn.Dropout(0.2))
        for n_epoch, learn.progress.run in ((1, False), (2, False)):       # `run` is False until the end of the fit
            before = learn.opt, vars(learn).get('final_record')
            if find:
                learn.lr_find(num_it=12, stop_div=False, show_plot=False)
                assert len(learn.recorder.lrs) == 12, "only the history is that of the search"
            assert before == (learn.opt, vars(learn).get('final_record')) and not learn.progress.run
            learn.fit(n_epoch)
        return [*weights(learn.model), torch.rand(1), torch.tensor(random.random())], str(learn.opt.state_dict())
    (w1, opt1), (w2, opt2) = run(False), run(True)
    assert same(w1, w2) and opt1 == opt2, "to the last bit: weights, buffers, optimizer, random numbers"

def test_lr_find_walks_through_the_rates_in_silence(capsys):
    class FitLog(EventLog):
        only_fit = True
    dls = ml.DataLoaders(Stream(), [line_data(8)], device='cpu')
    learn = ml.Learner(dls, Line(), F.mse_loss, cbs=[EventLog, FitLog])
    learn.final_record = 'of the last fit'
    assert learn.lr_find(1e-4, 1e-2, num_it=20, show_plot=False, suggest_funcs=None) is None
    assert learn.recorder.lrs == pytest.approx([1e-4 * 100**(i / 20) for i in range(20)]), "on through all epochs"
    assert learn.event_log.events.count('after_pred') == 20, "other callbacks take part; there is no validation"
    assert learn.fit_log.events == ['after_create'], "only_fit leaves a callback out"
    assert learn.logger is print and capsys.readouterr().out == '' and learn.final_record == 'of the last fit'
    with pytest.raises(ValueError, match='fewer than two losses'):
        line_learner().lr_find(num_it=1)
    with pytest.raises(ValueError, match='lr_find needs the Recorder'):
        line_learner(default_cbs=False, cbs=ml.TrainEvalCallback).lr_find()
    with pytest.raises(ValueError, match='in the middle of a fit'):
        line_learner().fit(1, cbs=ml.Callback(after_step=lambda self: self.learn.lr_find()))

def test_suggestions():
    lrs, losses = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1, 1.]), torch.tensor([4., 3.9, 2., 1.5, 3.])
    assert ml.minimum(lrs, losses, 5).item() == pytest.approx(1e-2), "a tenth of the rate with the lowest loss"
    assert ml.steep(lrs, losses, 5).item() == pytest.approx(1e-3), "where the steepest fall begins"
    uneven = torch.tensor([1e-4, 1e-2, 2e-2, 1e-1])
    assert ml.steep(uneven, torch.tensor([4., 3., 2.2, 2.]), 4).item() == pytest.approx(1e-2), "by the log of the rate"

@pytest.mark.parametrize('num_it, n, used', [(100, 18, slice(10, 13)), (100, 17, slice(0, 17)), (20, 2, slice(0, 2))])
def test_suggestions_leave_out_the_begin_the_end_and_nan(num_it, n, used):
    lrs = [float(i) for i in range(n)]
    recorder = types.SimpleNamespace(lrs=[*lrs, -1.], losses=[torch.tensor(1.)] * n + [torch.tensor(math.nan)])
    found = ml.suggest_lrs(recorder, num_it, [lambda lrs, losses, num_it: lrs[0], lambda lrs, *others: lrs[-1]])
    assert tuple(found) == (lrs[used][0], lrs[used][-1]), "unless hardly any would be left; lambdas are welcome"

def test_pictures_show_what_was_recorded():
    import matplotlib.pyplot as plt
    learn, ax = line_learner(), plt.subplots()[1]
    rec = learn.recorder
    learn.fit(3)
    assert rec.plot_loss(skip_start=2, log=True, ax=ax) is ax and ax.get_yscale() == 'log'
    train, valid = ax.lines
    assert list(train.get_xdata()) == list(range(2, 12)) and list(train.get_ydata()) == rec.losses[2:]
    assert list(valid.get_xdata()) == [4, 8, 12] and list(valid.get_ydata()) == [row[1] for row in rec.values]
    with pytest.raises(ValueError, match='no hyper was scheduled'):
        rec.plot_sched()
    learn.dls.valid = None
    learn.fit_one_cycle(1)
    assert len(rec.plot_loss().lines) == 1, "without validation there is no second curve"
    axs = rec.plot_sched()
    assert [ax.get_ylabel() for ax in axs.flat] == ['lr', 'mom'] and list(axs[0, 0].lines[0].get_ydata()) == rec.lrs
    found = learn.lr_find(num_it=40)
    curve, *marks = plt.gcf().axes[0].lines
    assert [mark.get_xdata()[0] for mark in marks] == list(found) and found._fields == ('minimum', 'steep')
    assert [mark.get_label() for mark in marks] == [f'{k}: {v:.1e}' for k, v in found._asdict().items()]
    assert list(curve.get_xdata()) == rec.lrs[:-5], "all but the last five, where the loss explodes"
    plt.close('all')

# =============================================================================================
promises("Optimizers, torch's optimizers, transfer")

@pytest.mark.parametrize('make', [ml.SGD, ml.RMSProp])
def test_decay_is_decoupled_by_default(make):
    p = param((2.,), (0.,))
    opt = make([p], lr=0.1, mom=0.9, wd=0.5)
    opt.step()
    opt.step()
    assert p.item() == pytest.approx(2 * (1 - 0.1 * 0.5)**2), "no gradient: momentum must not gather the decay"

def test_parameters_come_as_one_group_or_as_several():
    def lists(params): return ml.Optimizer(params, ml.sgd_step, lr=0.1).param_lists
    assert lists([1, 2, 3]) == lists(o for o in [1, 2, 3]) == [[1, 2, 3]], "bare parameters are one group"
    assert lists([[1, 2], [3]]) == lists([(o for o in [1, 2]), (3,)]) == [[1, 2], [3]], "iterables of them are groups"
    p = param()
    assert lists(p) == lists(iter([p])) == [[p]], "a tensor is one parameter, no list of numbers"
    for bad in ([{'params': [p], 'lr': 1.}], [[p], [param(), p]]):      # torch's form; one in two groups
        with pytest.raises(ValueError):
            ml.SGD(bad, lr=0.1)

def test_hypers_come_from_step_functions_and_keywords():
    def f(p, **kwargs): pass
    def g(p, **kwargs): pass
    f.defaults, g.defaults = {'lr': 1e-2, 'a': 1}, {'lr': 2e-2}
    assert ml.Optimizer([1], [f, g]).hypers == [{'lr': 2e-2, 'a': 1}], "later ones override"
    opt = ml.Optimizer([[1], [2]], functools.partial(f, b=1), lr=[3, 4])
    assert opt.hypers == [{'lr': 3, 'a': 1}, {'lr': 4, 'a': 1}], "keywords override all; a list has one per group"

@pytest.mark.parametrize('value, expected', [
    (0.5, [0.5] * 3), (0, [0] * 3), ((1, 2, 3), [1, 2, 3]), (slice(1e-4, 1e-2), [1e-4, 1e-3, 1e-2]),
    (slice(1e-2), [1e-3, 1e-3, 1e-2]), (torch.tensor([1., 2., 3.]), [1, 2, 3]), ([torch.tensor(0.5)] * 3, [0.5] * 3)])
def test_a_hyper_spreads_over_groups(value, expected):
    opt = ml.Optimizer([[1], [2], [3]], ml.sgd_step, lr=0.1, wd=7)
    opt.set_hyper('lr', value)
    assert [h['lr'] for h in opt.hypers] == pytest.approx(expected) and opt.hypers[1]['wd'] == 7
    assert {type(h['lr']) for h in opt.hypers} <= {int, float}, "plain numbers: they go into safe files"

@pytest.mark.parametrize('name, bad', [
    ('lr', [0.1, 0.2, -0.1]), ('lr', math.nan), ('lr', '0.1'), ('wd', -1), ('mom', slice(1, 0)), ('mom', [1, 2]),
    ('mom', math.nan), ('eps', -1)])
def test_bad_hypers_are_refused_by_name_before_anything_changes(name, bad):
    opt = ml.Optimizer([[1], [2], [3]], ml.sgd_step, lr=0.1)
    with pytest.raises(ValueError, match=f'^{name}='):
        opt.set_hyper(name, bad)
    assert opt.hypers == [{'lr': 0.1}] * 3

def test_a_missing_hyper_is_named_with_its_step_function():
    with pytest.raises(TypeError, match="'lr'") as info:
        ml.Optimizer([param()], ml.sgd_step, mom=1).step()
    assert "sgd_step got ['mom']" in info.value.__notes__[0], "what it got; the note says where to give more"

def test_all_params_and_their_gradients():
    p, q = param(), param()
    q.grad = None
    opt = ml.Optimizer([[p], [q]], ml.sgd_step, lr=[1, 2])
    assert [o[0] for o in opt.all_params(slice(1, None))] == [q] and len(opt.all_params(with_grad=True)) == 1
    opt.zero_grad(set_to_none=False)
    assert q.grad is None and close(p.grad, [0., 0.]), "filled with 0, but where there is no gradient none is made"

@pytest.mark.parametrize('make', [ml.Adam, ml.RMSProp, functools.partial(ml.SGD, mom=0.9, wd=0.2),
                                  functools.partial(ml.SGD, wd=0.1, decouple_wd=False)])
def test_many_parameters_are_updated_as_one_with_the_same_bits(make):
    together, alone = ([nn.Parameter(torch.full((2, 3), 1. + i, dtype=torch.float64 if i == 3 else torch.float32))
                        for i in range(12)] for _ in range(2))
    opt = make([together[:6], together[6:]], lr=[0.1, 0.2])
    opts = [make([p], lr=0.1 if i < 6 else 0.2) for i, p in enumerate(alone)]       # an optimizer each
    for i, (p, q, o) in enumerate(zip(together, alone, opts)):
        if i % 2:
            o.state[q]['do_wd'] = opt.state[p]['do_wd'] = False
        o.state[q]['tags'] = opt.state[p]['tags'] = ['a list has no hash']
    rng = torch.Generator().manual_seed(1)
    for step in range(5):
        for i, (p, q, o) in enumerate(zip(together, alone, opts)):
            grad = torch.randn(2, 3, generator=rng).to(p.dtype)
            p.grad, q.grad = (None, None) if i == step else (grad.clone(), grad.clone())    # so steps differ
            o.step()
        opt.step()
    assert same(together, alone), "also of two types, groups and marks, and without a gradient now and then"
    assert all(str(opt.state[p]) == str(o.state[q]) for p, q, o in zip(together, alone, opts)), "and the states"

def test_only_the_librarys_own_steps_see_many_parameters_as_one():
    def each_own(p, **kwargs):
        if p is not params[0]: ml.sgd_step(p, **kwargs)
    params = [param() for _ in range(12)]
    ml.Optimizer(params, [each_own, ml.weight_decay], lr=0.1, wd=0).step()
    assert close(params[0], [1., 2.]) and all(close(p, [0.95, 2.1]) for p in params[1:]), "yours get each alone"

MAKERS = [ml.Adam, lambda ps, lr: ml.OptimWrapper(ps, torch.optim.AdamW, lr=lr)]

def stepped(make, *values):
    opt = make([param(v, v) for v in values], lr=0.1)
    opt.step()
    return opt

@pytest.mark.parametrize('make', MAKERS)
def test_a_state_is_loaded_as_a_copy_or_refused_before_any_change(make):
    opt, one = stepped(make, (3.,), (1., 2.)), stepped(make, (3.,), (1., 2.))
    one.step()
    opt.load_state_dict(dict(reversed(one.state_dict().items())))       # the order of keys means nothing
    before = str(opt.state_dict())
    assert before == str(one.state_dict())
    one.step()
    assert str(opt.state_dict()) == before or make is not ml.Adam, "the other one steps by itself; torch's share"
    before, other_shapes = str(opt.state_dict()), [((1., 2.), (3.,)), ((3.,),), ((3.,), ((1., 2.),))]
    for state in [{}, make([[param()], [param()]], lr=0.1).state_dict(),
                  *(stepped(make, *shapes).state_dict() for shapes in other_shapes)]:
        with pytest.raises(ValueError):
            opt.load_state_dict(state)
    assert str(opt.state_dict()) == before

@pytest.mark.parametrize('own, torchs', [(ml.SGD, torch.optim.SGD), (ml.Adam, torch.optim.AdamW)])
def test_a_file_with_an_optimizer_of_the_other_kind_is_refused(own, torchs, tmp_path):
    for kinds in ((own, torchs), (torchs, own)):
        one, other, same_kind = (line_learner(line_dls(path=tmp_path), opt_func=kind) for kind in (*kinds, kinds[0]))
        one.fit_one_cycle(1)
        one.save('file')
        before = str(other.ensure_opt().state_dict())
        with pytest.raises(ValueError, match='optimizer'):
            other.load('file')
        assert same(weights(other.model), weights(Line())) and str(other.opt.state_dict()) == before
        same_kind.load('file')
        assert str(same_kind.opt.state_dict()) == str(one.opt.state_dict()), "a hyper that a fit has added is no misfit"

def test_param_groups_are_read_and_written_as_in_torch():
    opt = ml.Optimizer([[1], [2]], ml.sgd_step, lr=0.1)
    opt.param_groups[0]['lr'] = 5
    assert [dict(g) for g in opt.param_groups] == [{'params': [1], 'lr': 5}, {'params': [2], 'lr': 0.1}]
    opt.param_groups = [{'params': [3], 'lr': 1}]
    assert opt.param_lists == [[3]] and opt.hypers == [{'lr': 1}]

def test_the_wrapper_translates_hypers():
    p, q = param(), param()
    adam = ml.OptimWrapper([[p], [q]], torch.optim.AdamW, lr=0.1, betas=(0.8, 0.999), weight_decay=0.3)
    assert adam.param_lists == [[p], [q]] and 'betas' not in adam.hypers[0] and adam.hypers[0].items() >= {
        'lr': 0.1, 'mom': 0.8, 'sqr_mom': 0.999, 'wd': 0.3, 'eps': 1e-8, 'amsgrad': False}.items()
    adam.set_hypers(sqr_mom=[0.5, 0.6], mom=0.7, lr=slice(0.1, 1))
    assert [(g['betas'], g['lr']) for g in adam.opt.param_groups] == [((0.7, 0.5), pytest.approx(0.1)), ((0.7, 0.6), 1)]
    sgd = ml.OptimWrapper([p], functools.partial(torch.optim.SGD, momentum=0.7), lr=0.1)
    sgd.set_hyper('wd', 0.1)
    assert sgd.hypers[0]['mom'] == 0.7 and sgd.opt.param_groups[0]['weight_decay'] == 0.1
    rms = ml.OptimWrapper([p], torch.optim.RMSprop, lr=0.1)
    rms.set_hyper('sqr_mom', 0.5)
    assert rms.opt.param_groups[0]['alpha'] == 0.5, "RMSprop has no betas: its sqr_mom is alpha"

def test_the_wrapper_takes_what_torch_and_fastai_give():
    p, q, sgd = param(), param(), functools.partial(ml.OptimWrapper, opt=torch.optim.SGD, lr=0.1)
    inner = torch.optim.SGD([p], lr=0.1)
    assert ml.OptimWrapper(inner).opt is ml.OptimWrapper(opt=inner).opt is inner, "one that exists is used itself"
    assert [h['lr'] for h in sgd([{'params': [p], 'lr': 1.}, {'params': [q]}]).hypers] == [1., 0.1]
    assert sgd(iter([p, q])).param_lists == [[p, q]] and sgd(p).param_lists == [[p]]

@pytest.mark.parametrize('make', MAKERS)
def test_freezing_unfreezing_and_forgetting(make):
    p, q = param(), param()
    opt = make([[p], [q]], lr=0.1)
    opt.state[q]['do_wd'] = False
    opt.freeze()
    opt.step()
    assert close(p, [1., 2.]) and not close(q, [1., 2.]), "only the last group trains"
    assert 'avg' in str(opt.state_dict())
    opt.clear_state()
    assert opt.state[q] == {'do_wd': False} and 'avg' not in str(opt.state_dict()), "marks are no memory: they stay"
    opt.unfreeze()
    assert p.requires_grad and opt.frozen_idx == 0

@pytest.mark.parametrize('train_bn', [True, False])
def test_frozen_means_frozen_but_for_norm_layers_if_train_bn(train_bn):
    model = small_net()
    learn = line_learner(ml.DataLoaders(class_batches(), device='cpu'), model, loss_func=F.cross_entropy,
                         splitter=lambda m: [[*m[:2].parameters()], [*m[2:].parameters()]], train_bn=train_bn)
    learn.fit(1)
    learn.freeze_to(1)
    assert 'grad_avg' not in str(learn.opt.state_dict()), "freezing forgets what was averaged"
    before = weights(model[:2])
    learn.fit(1)
    still = [torch.equal(a, b) for a, b in zip(before, weights(model[:2]))]
    assert still == [True, True] + [not train_bn] * 5, "the statistics of a frozen norm layer rest with it"

# =============================================================================================
promises("Inference")

def test_validate_equals_one_pass_over_all_rows(capsys):
    learn = ml.Learner(line_dls(), Line(), F.mse_loss, metrics=F.l1_loss)
    x, y = learn.dls.valid_ds.tensors       # 24 rows: batches of 16 and 8
    assert learn.validate() == pytest.approx([f(learn.model(x), y).item() for f in (F.mse_loss, F.l1_loss)])
    assert learn.validate(0) == learn.validate(dl=learn.dls.train) != learn.validate(), "ds_idx=0: the training loader"
    assert learn.validate(dl=ml.TensorLoader(x, y, bs=16, drop_last=True)) == learn.validate(), "of all rows"
    assert learn.validate(dl=[x]) == [None, None], "without targets nothing is measured"
    log = EventLog()
    learn.metrics = ml.ValueMetric(functools.partial(lambda log: len(log.events), log))
    assert learn.validate(cbs=log)[1] > 0, "a metric may ask a callback"
    assert capsys.readouterr().out == '', "outside of a fit there is no table to print"
    for error, dl in ((ValueError, None), (TypeError, x)):      # the rows of x would be batches
        with pytest.raises(error, match='ds_idx=0|no loader'):
            ml.Learner(ml.DataLoaders([(x, y)], device='cpu'), Line(), F.mse_loss).validate(dl=dl)

def test_predictions_in_a_training_disturb_nothing():
    def look(self):
        if self.training:       # not in the pass that it starts itself
            self.learn.get_preds(with_loss=True), self.learn.validate()

    def run(cbs):
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(32, 10), torch.randint(3, (32,)))
        dls = ml.DataLoaders(DataLoader(data, 8, shuffle=True), DataLoader(data, 8), device='cpu')
        learn = line_learner(dls, nn.Sequential(nn.Dropout(0.3), small_net()), loss_func=F.cross_entropy, cbs=cbs)
        learn.fit_one_cycle(2)      # asks for the progress
        return weights(learn.model), [*map(float, learn.recorder.losses), torch.rand(1).item()], learn.recorder.values
    plain, *numbers = run(None)
    looked, *others = run(ml.Callback(after_loss=look, after_step=look, after_batch=look))
    assert same(plain, looked) and numbers == others

@pytest.mark.parametrize('make, rows', [
    (lambda data: DataLoader(data, 7, shuffle=True, drop_last=True), range(20)),
    (lambda data: DataLoader(data, 4, sampler=torch.utils.data.WeightedRandomSampler([1.], 20)), range(20)),
    (lambda data: DataLoader(data, 2, sampler=torch.utils.data.SubsetRandomSampler([7, 3, 5])), [7, 3, 5]),
    (lambda data: DataLoader(data, batch_sampler=[[3, 1], [2]]), [3, 1, 2]),
    (lambda data: DataLoader(data, 5, shuffle=True, collate_fn=lambda rows: data[:1]), [0] * 4),
    (lambda data: DataLoader(type('Rows', (IterableDataset,), {'__iter__': lambda self: iter(data)})(), 4), range(20)),
    (lambda data: type('Own', (DataLoader,), {'__iter__': lambda self: iter([data[3:5]])})(data), [3, 4])],
    ids=['shuffled', 'weighted', 'sampler', 'batch sampler', 'own collate', 'stream', 'own loader'])
def test_predictions_are_for_the_rows_of_their_loader_and_draw_no_number(make, rows):
    (x, y), before = line_data(20), torch.get_rng_state()
    found = line_learner().get_preds(dl=make(TensorDataset(x, y)))[1]
    assert found.flatten().equal(y[list(rows), 0]) and torch.get_rng_state().equal(before)

def test_predictions_are_joined_in_the_structure_of_the_outputs():
    Out, a, b = collections.namedtuple('Out', 'scores parts texts'), torch.zeros(2, 3), torch.ones(1, 3)
    joined = ml.concat([Out(a, [a, a], ['x', 'y']), Out(b, [b, b], ['z'])])
    assert type(joined) is Out and joined.scores.shape == (3, 3) and joined.texts == ['x', 'y', 'z']
    assert type(joined.parts) is list and joined.parts[1].equal(torch.cat([a, b])) and ml.concat([None, None]) is None

def test_predictions_are_copies_as_a_loader_may_use_its_memory_again():
    x = torch.zeros(1, 1)
    dl = type('Refilled', (), {'__iter__': lambda self: (x.fill_(i) for i in range(3))})()
    assert line_learner().get_preds(dl=dl, with_input=True)[0].flatten().tolist() == [0, 1, 2]

def test_show_results_puts_target_over_prediction():
    dls = ml.DataLoaders([], class_batches(1), device='cpu', vocab='abc')
    learn = line_learner(dls, small_net(), loss_func=F.cross_entropy)
    titles = [f"{'abc'[t]}\n{'abc'[p]}" for t, p in zip(*learn.get_preds(with_decoded=True)[1:])]
    axs = learn.show_results(max_n=3, shuffle=False)
    assert [ax.get_title() for ax in axs.flat] == [*titles[:3], '']
    dls.split, learn.loss_func = lambda b: (b[0], (b[1], b[1])), lambda pred, y, z: F.cross_entropy(pred, y)
    assert learn.show_results(max_n=1).flat[0].get_title()[0] in 'abc', "of several targets, the first"

# =============================================================================================
promises("Saving, and files that are hostile or broken")

def saved(path, **kwargs):
    """A learner after an epoch, and the file in which it is."""
    learn = line_learner(line_dls(path=path), **kwargs)
    learn.fit(1)
    return learn, learn.save('file')

@pytest.mark.parametrize('opt_func', [ml.Adam, torch.optim.AdamW])
def test_a_loaded_learner_goes_on_like_the_one_that_was_saved(tmp_path, monkeypatch, opt_func):
    with monkeypatch.context() as patch:    # saved on a GPU, and loaded where there is none
        patch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:7')
        learn, _ = saved(tmp_path, opt_func=opt_func)
    other = line_learner(line_dls(path=tmp_path), opt_func=opt_func)
    assert other.load('file') is other and str(other.opt.state_dict()) == str(learn.opt.state_dict())
    for one in (learn, other):
        one.fit(1)
    assert same(weights(learn.model), weights(other.model))

def test_files_have_their_places_and_open_with_stock_torch(tmp_path):
    learn, file = saved(tmp_path)
    assert file == tmp_path / 'models' / 'file.pth' == learn.save('file.pth'), "the suffix is not added twice"
    assert line_learner(path=tmp_path).load('file', with_opt=False).opt is None, "no optimizer is made for nothing"
    own = learn.save(tmp_path / 'own.bin', with_opt=False)
    assert [[*torch.load(f, weights_only=True)] for f in (file, own)] == [['model', 'opt'], ['a', 'b']]
    other = line_learner(model=nn.ParameterDict({'b': torch.ones(()), 'c': torch.ones(())}))
    with pytest.warns(UserWarning, match="'c'.*'a'"):
        assert other.load(own, strict=False).model['b'] == learn.model.b and other.model['c'] == 1, "what fits by name"

BAD_FILES = {
    'empty': lambda data, at: b'', 'text': lambda data, at: b'hello', 'cut': lambda data, at: data[:len(data) // 2],
    'flipped': lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1:],
    'code': type('Run', (), {'__reduce__': lambda self: (os.mkdir, ('was-here',))})(),
    'shape': {'a': torch.ones(2), 'b': torch.ones(())}, 'number': {'a': 1., 'b': 1.}, 'keys': {1: 1},
    'meta': {'a': torch.ones((), device='meta'), 'b': torch.ones(())},
    'sparse': {'a': torch.ones(()).to_sparse(), 'b': torch.ones(())},
    'no optimizer': {'model': Line().state_dict(), 'opt': {'state': [], 'hypers': []}},
    'states': {'model': Line().state_dict(), 'opt': {'state': [1, 2], 'hypers': [dict(lr=1., sqr_mom=1., eps=1.)]}}}

@pytest.mark.parametrize('damage', BAD_FILES)
def test_bad_files_change_nothing_and_run_no_code(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    (learn, file), bad = saved(tmp_path), BAD_FILES[damage]
    data, before = file.read_bytes(), (weights(learn.model), str(learn.opt.state_dict()))
    if callable(bad):
        file.write_bytes(bad(data, data.index(learn.model.a.detach().numpy().tobytes())))
    else:
        torch.save(bad, file)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        learn.load('file')
    assert same(weights(learn.model), before[0]) and str(learn.opt.state_dict()) == before[1]
    assert not Path('was-here').exists()

def test_export_names_what_cannot_be_pickled_and_load_learner_what_is_no_learner(tmp_path):
    learn = line_learner(line_dls(path=tmp_path), loss_func=lambda pred, y: F.mse_loss(pred, y))
    with pytest.raises((pickle.PicklingError, AttributeError), match='lambda'):     # by version of Python
        learn.export()
    assert learn.dls.train_ds is not None and not list(tmp_path.iterdir()), "a failed export leaves all as it was"
    torch.save({'a': 1}, tmp_path / 'y.pkl')
    with pytest.raises(ValueError, match='y.pkl'):
        ml.load_learner(tmp_path / 'y.pkl')
    file = line_learner(ml.DataLoaders([], device='meta', path=tmp_path)).export()
    assert [ml.load_learner(file, *cpu).dls.device.type for cpu in ((), (False,))] == ['cpu', 'meta']

# =============================================================================================
promises("The shelf, precision, checkpoints")

@pytest.mark.parametrize('make, says', [
    (lambda: ml.EarlyStoppingCallback(patience=0), 'patience=0'), (lambda: ml.MixedPrecision('fp8'), "amp_mode='fp8'"),
    (lambda: line_learner(cbs=ml.TrackerCallback('acc')).fit(1), "monitor='acc'.*'train_loss', 'valid_loss'"),
    (lambda: line_learner(cbs=ml.TrackerCallback).remove_cb(ml.Recorder).fit(1), 'needs the Recorder')])
def test_what_makes_no_sense_is_refused_at_once(make, says):
    with pytest.raises(ValueError, match=says):
        make()

def test_trackers_begin_anew_or_remember():
    assert ml.TrackerCallback().comp(1, 2) and ml.TrackerCallback('error_rate').comp(1, 2), "less loss is better"
    cb = ml.TrackerCallback('score')
    learn = scripted([], cb)
    for cb.reset_on_fit, learn.scripted.values, best in [(True, [3, 4], 4), (False, [1, 1], 4), (True, [1, 1], 1)]:
        learn.fit(2)
        assert cb.best == best, "reset_on_fit: each fit looks for its own best"

class Rows(IterableDataset):
    """A data set that does not tell how many rows come."""
    def __init__(self, rows): self.rows = rows

    def __iter__(self): return iter(self.rows)

@pytest.mark.parametrize('small, large, n_acc', [
    ([4] * 10, [16, 16, 8], 16), ([3] * 5 + [1], [9, 7], 7), ([20, 20], [20, 20], 1)])
def test_accumulated_gradients_need_no_length_and_are_clipped_as_a_whole(small, large, n_acc):
    acc = fit_line(DataLoader(Rows(cut(*small)), None), ml.GradientAccumulation(n_acc), ml.GradientClip(2.), n_epoch=2)
    one = fit_line(cut(*large), ml.GradientClip(2.), n_epoch=2)
    assert same_fit(acc, one), "also the last, smaller window"

def test_what_was_cancelled_or_predicted_is_no_part_of_a_mean():
    batches = cut(8, 8, 8, 8)
    def stop(self):
        if self.epoch == 0 and self.iter == 2: raise ml.CancelTrainException
    predict = ml.Callback(after_step=lambda self: self.learn.get_preds(dl=batches))
    for cb, n_epoch in [(ml.Callback(before_batch=stop), 2), (predict, 1)]:
        acc = fit_line(batches, ml.GradientAccumulation(100), cb, n_epoch=n_epoch)
        assert same_fit(acc, fit_line(cut(32))), "the next training begins anew; predictions do not disturb"

@pytest.mark.filterwarnings('ignore:nothing was trained')
def test_autocast_is_left_however_a_batch_ends():
    def cancel(self): raise ml.CancelBatchException
    def predict(self): self.training and self.learn.get_preds()
    for cb in (ml.Callback(before_batch=predict), ml.Callback(after_pred=cancel)):
        line_learner(cbs=cb).to_bf16().fit(1)
        assert not torch.is_autocast_enabled('cpu'), "after predictions in the middle, and without a loss"

def test_float16_without_cuda_is_bfloat16_and_says_so_once():
    learn = line_learner().to_fp16()
    with pytest.warns(UserWarning, match='float16 on cpu'):
        learn.fit(1, cbs=ml.Callback(after_batch=lambda self: self.mixed_precision.scaler and 1 / 0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)

def fp16_learner(monkeypatch, **kwargs):
    """Trains in float16 with a scaler, on the CPU, which the library would not do by itself."""
    monkeypatch.setattr(ml, 'FP16_DEVICES', {'cpu'})
    scaler = functools.partial(torch.amp.GradScaler, init_scale=8., growth_interval=3)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    return line_learner(opt_func=ml.SGD, **kwargs).to_fp16()

def test_scaled_gradients_are_accumulated_then_unscaled_then_clipped(monkeypatch):
    plain, learn = (make(cbs=[ml.GradientClip(0.5), ml.GradientAccumulation(32)]) for make in (
        functools.partial(line_learner, opt_func=ml.SGD), functools.partial(fp16_learner, monkeypatch)))
    plain.fit(2), learn.fit(2)
    assert [float(w) for w in weights(learn.model)] == pytest.approx([float(w) for w in weights(plain.model)], rel=0.01)
    assert learn.recorder.values[-1] == pytest.approx(plain.recorder.values[-1], rel=0.02), "losses are not scaled"
    assert learn.mixed_precision.scaler.get_scale() == 16., "four good steps: it has grown once"

def test_a_step_with_infinite_gradients_is_skipped(monkeypatch):
    def spoil(self):
        if self.train_iter == 1 and self.completed: self.model.a.grad.fill_(math.inf)
    events, seen = EventLog(), []
    note = ml.Callback(after_batch=lambda self: self.training and seen.append(weights(self.model)))
    learn = fp16_learner(monkeypatch, cbs=[ml.Callback(after_backward=spoil), events, note])
    learn.fit_one_cycle(1, 0.1)
    assert [same(a, b) for a, b in zip(seen, seen[1:])] == [True, False, False], "skipped: no weight is inf"
    assert events.events.count('after_cancel_step') == 1 and len(learn.recorder.hps['lr']) == 4, "the schedule goes on"
    assert learn.mixed_precision.scaler.get_scale() == 4., "halved once"

@needs_cuda
def test_float16_on_cuda(tmp_path):
    learn = line_learner(line_dls(device='cuda'), path=tmp_path).to_fp16()
    learn.fit(3, cbs=ml.CheckpointCallback('run'))
    assert learn.mixed_precision.scaler.get_scale() > 1 and learn.get_preds()[0].dtype == torch.float32
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1], "it learns"

@pytest.mark.parametrize('cbs, n_epoch', [([], 5), ([ml.EarlyStoppingCallback], 2)])
def test_a_training_that_is_complete_trains_no_more(tmp_path, cbs, n_epoch):
    cbs = [cb(min_delta=9.) for cb in cbs]      # nobody improves by that much: stopped early is complete, too
    done, again = (checkpointed(tmp_path, cbs=[copy.copy(cb) for cb in cbs]) for _ in range(2))
    assert again.recorder.values == done.recorder.values and len(done.recorder.values) == n_epoch
    assert same(weights(again.model), weights(done.model)) and again.final_record == done.final_record
    assert float(again.smooth_loss) == float(done.recorder.losses[-1])

def test_a_checkpoint_is_of_whole_epochs_and_can_be_read(tmp_path):
    ended = checkpointed(tmp_path, cbs=[RaiseAt('before_step', ml.CancelFitException())])
    assert not ended.model_file('run').exists(), "a fit that is ended in the middle of an epoch is not complete"
    with pytest.raises(ValueError, match='cannot load'):
        checkpointed(tmp_path, cbs=type('Net', (ml.Callback,), {'keeps': ('net',), 'net': Line()}))

def test_the_same_object_goes_on_after_ctrl_c_and_serves_one_fit(tmp_path, capsys):
    learn, stop = line_learner(path=tmp_path, cbs=[ml.CheckpointCallback('run')]), Counts(2)
    learn.logger = print
    for stop.stop in (2, None):
        with contextlib.suppress(KeyboardInterrupt):
            learn.fit(4, cbs=stop)
    assert learn.train_iter == 16 and len(learn.recorder.values) == 4, "interrupted: it goes on"
    assert 'run.pth: 2 epochs are left' in capsys.readouterr().out, "and says so"
    with pytest.raises(ValueError, match='serves one fit'):
        learn.fit(4, cbs=stop)

exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0)

# =============================================================================================
promises("Many processes")      # README's script, started by torchrun, is tested with README

def in_two_processes(folder, jobs):
    """Run `jobs`, functions of this file by name, in two processes; write what each of them returns, or its error."""
    import torch._dynamo    # as DistributedDataParallel does, but once for all
    for job in jobs:
        for rank in (0, 1):
            if os.fork() == 0:      # a child; unlike torchrun's, it need not import torch again
                os.environ['TORCHELASTIC_RUN_ID'] = 'as if by torchrun'
                try:
                    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/{job}',
                                                         rank=rank, world_size=2)
                    result = globals()[job]()
                except BaseException:
                    result = traceback.format_exc()
                torch.save(result, Path(folder, f'{job}-{rank}'))
                os._exit(0)
        os.wait(), os.wait()

@pytest.fixture(scope='session')
def together_started(background, tmp_path_factory):
    """All jobs in two processes each, beside the tests: their folder, and who starts them."""
    folder, jobs = tmp_path_factory.mktemp('together'), [name for name in globals() if name.startswith('job_')]
    code = f'import {Path(NAME).stem} as tests; tests.in_two_processes({str(folder)!r}, {jobs})'
    return folder, background(sys.executable, '-c', code, cwd=folder, CUDA_VISIBLE_DEVICES='')

@pytest.fixture(scope='session')
def of_two(together_started):
    """A function from a job to what each of two processes has returned."""
    if not hasattr(os, 'fork'):
        pytest.skip('needs os.fork')
    folder, process = together_started
    done = outcome(process)
    assert done.returncode == 0, done.stderr
    return lambda job: [torch.load(folder / f'{job}-{rank}', weights_only=True) for rank in (0, 1)]

def shared_learner(n_processes=2, shuffle=False, **kwargs):
    """A learner on three classes: 80 rows to train, 16 at a time by all together; 37 rows to validate."""
    seed_cpu(0)
    x = torch.randn(117, 10)
    y, bs = (x[:, 0] > 0).long() + (x[:, 1] > 0), 16 // n_processes
    dls = ml.DataLoaders(ml.TensorLoader(x[:80], y[:80], bs=bs, shuffle=shuffle),
                         ml.TensorLoader(x[80:], y[80:], bs=bs), device='cpu')
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    return line_learner(dls, model, loss_func=nn.CrossEntropyLoss(), opt_func=ml.SGD, metrics=ml.accuracy,
                        splitter=lambda m: [[*m[0].parameters()], [*m[2].parameters()]], **kwargs)

def fit_with_torch_loader(learn):
    learn.recorder.train_metrics = True
    learn.dls.train = DataLoader(TensorDataset(*learn.dls.train.dataset.tensors), learn.dls.train.bs)
    learn.fit_one_cycle(2, 0.1, cbs=ml.GradientClip(0.1))

FITS = {
    'fit': lambda learn: learn.fit(4), 'loader of torch': fit_with_torch_loader,
    'accumulation': lambda learn: learn.fit(2, cbs=ml.GradientAccumulation(32)),
    'fine_tune': lambda learn: learn.fine_tune(1, 0.1),
    'lr_find': lambda learn: learn.fit(1, learn.lr_find(num_it=5, end_lr=0.1, show_plot=False)[1]),
    'early stopping': lambda learn: learn.fit(9, cbs=[ml.EarlyStoppingCallback(min_delta=0.03),
                                                      ml.SaveModelCallback(with_opt=True)])}

def trained(how, n_processes):
    learn = shared_learner(n_processes)
    with learn.distrib_ctx() if n_processes > 1 else contextlib.nullcontext():
        FITS[how](learn)
        return {'weights': weights(learn.model), 'losses': learn.recorder.losses,
                'values': torch.tensor(learn.recorder.values), 'validate': torch.tensor(learn.validate()),
                'predictions': list(learn.get_preds(with_input=True, with_loss=True))}

def job_fits(): return {how: trained(how, 2) for how in FITS}

@pytest.mark.parametrize('how', FITS)
def test_two_processes_equal_one_however_they_train(of_two, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, (a, b) = trained(how, 1), [found[how] for found in of_two('job_fits')]
    torch.testing.assert_close(a, one, rtol=1e-5, atol=1e-6)
    exactly(a, b)       # both have the same results, to the last bit

def job_resumed():
    found = []
    for name, stop in (('whole', None), ('resumed', 1), ('resumed', None)):
        learn = shared_learner(shuffle=True)
        torch.rand(1 + len(found) // 2)         # the file brings its own random numbers
        with learn.distrib_ctx(), contextlib.suppress(KeyboardInterrupt):
            learn.fit_one_cycle(3, 0.1, cbs=[Counts(stop), ml.CheckpointCallback(name)])
        found.append([weights(learn.model), learn.recorder.values])
    return found

def test_resumed_in_two_processes_equals_uninterrupted(of_two):
    for whole, cut_off, resumed in of_two('job_resumed'):
        exactly(resumed, whole)
        assert len(cut_off[1]) == 2

def job_shares():
    x, shares = torch.arange(9.)[:, None], []
    def begin(self): shares.append([])
    def note(self): shares[-1].extend(self.x[:, 0].tolist())
    see = ml.Callback(before_train=begin, before_validate=begin, before_batch=note)
    learn = line_learner(ml.DataLoaders(ml.TensorLoader(x, x, bs=2, shuffle=True, drop_last=True),
                                        ml.TensorLoader(x, x, bs=2), [(x, x)], device='cpu'))
    learn.model.unused = nn.Parameter(torch.ones(1))    # an error, unless torch is told to look for it
    with learn.distrib_ctx(find_unused_parameters=True):
        learn.fit(2, cbs=see)
        learn.validate(ds_idx=2, cbs=see)
    return shares

def test_each_process_has_its_share_of_the_rows(of_two):
    (train, valid, train2, _, rest), (train_b, valid_b, train2_b, _, rest_b) = of_two('job_shares')
    for one, two in [(train, train_b), (train2, train2_b)]:
        assert len(one) == len(two) == 4 and len({*one, *two}) == 8, "half of nine rows; the loader's drop_last counts"
    assert train != train2, "each epoch has another order"
    assert valid + valid_b == list(range(9)), "no row is validated twice"
    assert rest == list(range(9)) and rest_b == [], "a list has no numbered rows: the first process reads it alone"

def job_files():
    out, learn = io.StringIO(), shared_learner(path='files')
    model, loaders, learn.logger = learn.model, list(learn.dls.loaders), print
    model.insert(1, nn.BatchNorm1d(16))
    def fail(self): raise KeyError
    with contextlib.redirect_stdout(out), learn.distrib_ctx():
        with contextlib.suppress(KeyError):
            learn.fit(1, cbs=ml.Callback(after_loss=fail))      # in both: it can be used afterwards
        learn.fit(1)
        learn.save('saved')
        with learn.distrib_ctx():                               # inside of itself
            learn.load('saved')
        learn.get_preds(save_preds='p')
        one_row = learn.validate(dl=ml.TensorLoader(torch.ones(1, 10), torch.ones(1).long()))[1]
    n_rows = sum(len(torch.load(file)) for file in Path('p').iterdir())
    is_as_before = learn.model is model and learn.dls.loaders == loaders and not hasattr(learn, 'distributed')
    return {'n_lines': len(out.getvalue().splitlines()), 'n_rows': n_rows, 'one row': one_row in (0., 1.),
            'as before': is_as_before and learn.logger is print, 'buffers': [b.tolist() for b in model.buffers()]}

def test_the_first_process_prints_and_saves_and_each_row_is_written_once(of_two):
    one, two = of_two('job_files')
    assert one.pop('n_lines') > 0 == two.pop('n_lines'), "one table"
    assert one == two and one.pop('buffers'), "also the running means, or the saved model would be another one"
    assert one == {'n_rows': 37, 'one row': True, 'as before': True}

class Batches(ml.Metric):
    """Knows the batches of its own process alone."""
    def accumulate(self, learn): self.value = 1.

def job_refusals():
    own, joined, found = Batches(), Batches(), []
    joined.sync_on_compute = True       # as those of torchmetrics do, it says that it asks the others by itself
    rows, weighted = ml.TensorLoader(*line_data(4)), torch.utils.data.WeightedRandomSampler([1.] * 4, 4)
    for train, metric in [(rows, own), (rows, joined), ([line_data(4)], []), (DataLoader(Rows([])), []),
                          (DataLoader(rows.dataset, sampler=weighted), [])]:
        learn = line_learner(ml.DataLoaders(train, [line_data(4)], device='cpu'), metrics=metric)
        with learn.distrib_ctx():
            try:
                learn.fit(1)
                found.append('joined')
            except TypeError:
                found.append('refused')
    return found

def test_what_cannot_be_split_or_joined_is_an_error(of_two):
    assert of_two('job_refusals') == [['refused', 'joined', 'refused', 'refused', 'refused']] * 2

def job_nan():
    class Loss(nn.Module):
        def forward(self, pred, y): return pred.sum() * (math.nan if torch.distributed.get_rank() == 0 else 1)
    learn = line_learner(loss_func=Loss())
    with learn.distrib_ctx():
        learn.fit(1, cbs=ml.TerminateOnNaNCallback)
    return learn.train_iter, all(p.isfinite().all() for p in learn.model.parameters())

def test_nan_in_one_process_stops_all(of_two):
    assert of_two('job_nan') == [(1, True)] * 2, "after one batch, before its step"

def job_fails():
    def fail(self):
        if torch.distributed.get_rank() == 1 and self.iter == 1: raise ValueError('something of its own')
    learn = line_learner(cbs=[ml.Callback(after_pred=fail), ml.SaveModelCallback(fname='best')])
    with learn.distrib_ctx():
        learn.fit(2)

def test_an_error_in_one_process_ends_all(of_two):
    one, two = of_two('job_fails')
    assert isinstance(one, str) and 'ValueError: something of its own' in two, one

def test_without_torchrun_it_says_what_to_type():
    learn = line_learner()
    with pytest.warns(UserWarning, match='torchrun --nproc_per_node=2'), learn.distrib_ctx():
        learn.fit(1)
    assert len(learn.recorder.losses) == 4, "the one process trains alone"

# =============================================================================================
promises("The documents: what fastai's pages about Learner show, and no other test has")

def test_examples_of_fastais_pages(capsys):
    learn = line_learner(cbs=ml.Callback(after_fit=lambda self: print('after_fit')))
    assert learn.data is learn.dls and learn.opt is None, "an optimizer is made when it is needed, not before"
    learn.create_opt()
    assert learn.opt.hypers[0]['lr'] == learn.lr, "a new optimizer begins with the learner's rate"
    learn(['before_fit', 'before_epoch', 'after_fit'])
    assert capsys.readouterr().out == 'after_fit\n', "calling the learner with events reaches its callbacks, once"
    assert learn.init_args['Learner.__init__.lr'] == 0.1, "init_args tells how the learner was made"

# =============================================================================================
promises("Trust: what holds when things go wrong")

def test_no_value_is_read_from_the_device_per_batch():
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.append(func) if func is torch.ops.aten._local_scalar_dense.default else None
            return func(*args, **(kwargs or {}))

    def reads_of(n_batches):
        learn = line_learner(line_dls(16 * n_batches, 16 * n_batches), metrics=[F.l1_loss, ml.AvgSmoothLoss()])
        learn.recorder.train_metrics = True
        reads.clear()
        with Count():
            learn.fit_one_cycle(1, cbs=[ml.GradientClip, ml.GradientAccumulation(32)])
        return len(reads)
    reads = []
    assert reads_of(2) == reads_of(20) > 0, "each would make a GPU wait; those of an epoch's row are as many as ever"

def trust_learner(model=None, **kwargs):
    """Batch norm, dropout and momentum: whatever is not put back will show."""
    data, model = class_batches(3), model or nn.Sequential(small_net(), nn.Dropout(0.2))
    seed_cpu(0)
    return line_learner(ml.DataLoaders(data[:2], data[2:], device='cpu'), model, loss_func=nn.CrossEntropyLoss(),
                        opt_func=functools.partial(ml.SGD, mom=0.9), metrics=ml.accuracy, **kwargs)

class Interrupt(RaiseAt):
    """Notes the events, and, without keeping them, what holds the graph."""
    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.refs = [], []

    def see(self, name):
        self.seen.append((name, self.learn.training))
        self.refs += [weakref.ref(t) for t in (self.learn.pred, self.learn.loss) if torch.is_tensor(t)]
        super().see(name)

def open_parts(events):
    """The parts that these events have begun and not ended, from the outside in; one within another."""
    parts = []
    for name in events:
        when, _, part = name.rpartition('_')
        if when == 'before':
            parts.append(part)
        elif part not in ('pred', 'loss'):
            assert parts[-1] == part, f"{name} comes while {parts} have begun"
            parts = parts[:-1] if when == 'after' else parts
    return parts

def ends_in_order(events, at, kind):
    """Whether what was raised at event number `at` has cancelled its own part; all that has begun must end."""
    begun, after = open_parts(events[:at + 1]), events[at + 1:]
    ended = [f'after_{part}' for part in begun[::-1]]
    if kind in begun:       # it ends there, after what it holds; all else goes on to the end
        ended = [*ended[:ended.index(f'after_{kind}')], f'after_cancel_{kind}', f'after_{kind}']
        after = after[:len(ended)]
    assert after == ended and open_parts(events) == [], f'{kind} at {events[at]}'
    return kind in begun

WAYS_IN = {'fit_one_cycle': lambda learn: learn.fit_one_cycle(1), 'validate': lambda learn: learn.validate(),
           'lr_find': lambda learn: learn.lr_find(num_it=4, show_plot=False),
           'get_preds': lambda learn: learn.get_preds(with_loss=True)}

@pytest.mark.parametrize('way, kind', [(way, kind) for way in WAYS_IN for kind in KINDS
                                       if way == 'fit_one_cycle' or kind in ('batch', 'fit', 'error', 'ctrl-c')])
def test_whatever_is_raised_at_any_event_leaves_a_usable_learner(way, kind):
    dry_run = Interrupt(None, None)
    WAYS_IN[way](trust_learner().add_cb(dry_run))
    for event, training in dict.fromkeys(dry_run.seen):
        watch, what, escaped = Interrupt(event, KINDS[kind]('on purpose'), training), f'{kind} at {event}', None
        learn = trust_learner().add_cb(watch)
        cbs, loss_func, before = list(learn.cbs), learn.loss_func, weights(learn.model)
        try:
            WAYS_IN[way](learn)
        except BaseException as e:
            escaped = e
        at, events = watch.seen.index((event, training)), [name for name, _ in watch.seen]
        if way == 'lr_find':        # ends validations that nobody sees, and may have too few losses in the end
            is_cancelled = escaped is not watch.error
            assert not (is_cancelled and kind in ('error', 'ctrl-c')), what
        else:
            is_cancelled = ends_in_order(events, at, kind)
            assert is_cancelled == (escaped is None), what
        if not is_cancelled:
            assert escaped is watch.error, f"{what}: an error keeps its identity"
            assert f'raised by the callback Interrupt in {event}' in escaped.__notes__
        # all is put back
        assert learn.cbs == cbs and learn.loss_func is loss_func and loss_func.reduction == 'mean', what
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled() and not learn.training, what
        escaped = watch.error.__traceback__ = None      # it holds the frames, and these the graph
        if is_cancelled or way != 'fit_one_cycle':     # after an error in a fit, the batch stays for the debugger
            assert learn.dl is None and learn.xb == (None,), what
            assert not any(ref() is not None and ref().grad_fn for ref in watch.refs), f"{what}: memory would be held"
        assert way == 'fit_one_cycle' or same(weights(learn.model), before), what
        # and the learner is as good as new
        learn.remove_cb(watch)
        fresh = trust_learner(copy.deepcopy(learn.model))
        fresh.ensure_opt().load_state_dict(learn.ensure_opt().state_dict())
        for o in (learn, fresh):
            seed_cpu(1)
            o.fit(1)
        assert same(weights(learn.model), weights(fresh.model)), f"{what}: it trains on as a new learner would"
        assert learn.recorder.values == fresh.recorder.values, what

def look(self):
    """What a person may want in the middle of a training."""
    learn = self.learn
    if self.training and self.iter % 3 == 0:        # not in the pass that it starts itself
        learn.validate(), learn.predict(torch.ones(10)), learn.save('here'), learn.export()
        learn.recorder.plot_loss(skip_start=0), learn.show_results()
        __import__('matplotlib.pyplot').pyplot.close('all')

@pytest.mark.parametrize('cbs', [ml.defaults.callbacks[1:], [ml.CheckpointCallback('run')],
                                 [ml.Recorder, ml.Callback(after_loss=look)]], ids=['shown', 'checkpoint', 'looked at'])
def test_to_watch_a_training_changes_nothing(tmp_path, cbs):
    def trained(*cbs):
        ml.set_seed(0)
        x = torch.randn(30, 10)
        dls = ml.DataLoaders.from_tensors(x, (x[:, 0] > 0).long(), bs=8, device='cpu', vocab='abc')
        learn = line_learner(dls, trust_learner().model, loss_func=nn.CrossEntropyLoss(), path=tmp_path,
                             cbs=[ml.TrainEvalCallback, *cbs], default_cbs=False)
        learn.fit(2)
        return weights(learn.model), torch.rand(3).tolist(), random.random()
    plain, watched = trained(), trained(*cbs)
    assert same(plain[0], watched[0]), "the weights are others"
    assert plain[1:] == watched[1:], "a random number was drawn"

def test_spoilt_files_change_nothing(tmp_path):
    learn = line_learner(path=tmp_path)
    learn.fit(1)
    file = learn.save('file')
    data, before = file.read_bytes(), (weights(learn.model), str(learn.opt.state_dict()))
    for i in random.Random(0).sample(range(len(data)), 60):
        for other in (b'', bytes([data[i] ^ 1 << i % 8]) + data[i + 1:], b'x' + data[i:], data[i + 9:]):
            file.write_bytes(data[:i] + other)
            with contextlib.suppress(ValueError):       # some bytes, such as dates and padding, mean nothing
                learn.load('file')
            assert same(weights(learn.model), before[0]) and str(learn.opt.state_dict()) == before[1]

def killed_training(folder, n_kills):
    """Train in one go; then again, killed `n_kills` times at any moment; write both results."""
    rng, write = random.Random(0), ml.save_state

    def start(name, seconds=0., in_save=0.):
        """Train in a process that a timer kills after `seconds`, or `in_save` seconds after a save began."""
        child = os.fork()
        if child:
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status) or status == 0, "it can always go on"
            return os.WIFSIGNALED(status)
        signal.setitimer(signal.ITIMER_REAL, seconds)       # 0: never
        def save_state(*args):
            if in_save and rng.random() < 0.2: signal.setitimer(signal.ITIMER_REAL, in_save)
            write(*args)
        ml.save_state = save_state
        ml.set_seed(0)
        x, y = line_data(192)
        data = DataLoader(TensorDataset(x[:128], y[:128]), 16, shuffle=True, generator=torch.Generator())
        dls = ml.DataLoaders(data, ml.TensorLoader(x[128:], y[128:], bs=24), device='cpu')
        model = nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 1))
        learn = line_learner(dls, model, path=folder)
        stop, best = ml.EarlyStoppingCallback(patience=9), ml.SaveModelCallback(fname=f'{name}-best')
        learn.fit_one_cycle(12, 0.05, cbs=[stop, best, ml.MixedPrecision('bf16'), ml.CheckpointCallback(name)])
        r, draws = learn.recorder, [random.random(), torch.rand(1), torch.rand(1, generator=data.generator)]
        torch.save({'model': weights(model), 'opt': learn.opt.state_dict(), 'random': draws, 'best': stop.best,
                    'history': [r.values, r.lrs, r.losses, r.iters, r.hps], 'train_iter': learn.train_iter,
                    'validate': learn.validate()}, f'{folder}/{name}-result')
        os._exit(0)

    begin, result, n = time.time(), Path(folder, 'killed-result'), 0
    start('whole')
    duration = time.time() - begin
    while n < n_kills:
        if result.exists():         # it was too fast: begin anew
            result.unlink(), Path(folder, 'models/killed.pth').unlink()
        n += start('killed', rng.random() * duration, rng.random() * 0.002 * (n % 2))
    start('killed')

@pytest.fixture(scope='session')
def killed(background, tmp_path_factory):
    """The folder of a training that is killed and resumed, and what runs there."""
    folder, n = tmp_path_factory.mktemp('killed'), int(os.environ.get('KILLS', '6'))    # KILLS=30 pytest -k killed
    code = f'import {Path(NAME).stem} as tests; tests.killed_training({str(folder)!r}, {n})'
    return folder, background(sys.executable, '-c', code, cwd=folder, CUDA_VISIBLE_DEVICES='')

@pytest.mark.skipif(not hasattr(os, 'fork'), reason="kills forked processes")
def test_a_training_that_was_killed_anywhere_ends_with_the_same_bits(killed):
    folder, process = killed
    done = outcome(process, patience=600)
    assert done.returncode == 0, done.stderr
    whole, resumed = (torch.load(folder / f'{name}-result', weights_only=True) for name in ('whole', 'killed'))
    exactly(resumed, whole)

# =============================================================================================
promises("The file itself, and the code in README.md and tutorial.ipynb")

TUTORIAL = HERE / 'tutorial.ipynb'
needs_tutorial = pytest.mark.skipif(not TUTORIAL.exists(), reason="tutorial.ipynb is not here")
PYTHON_IN_README = re.findall(r'```python\n(.*?)```', README, re.S)
BANNER = re.compile(r'^# (\d+)\. [^\n:]+: [^\n]+\n# -{80,}\n(?:# Needs: ([^\n]+)\n)?', re.M)
SECTIONS = {int(m[1]): m for m in BANNER.finditer(SOURCE)}
CUT = re.search('^# PART II', SOURCE, re.M).start()

def test_import_brings_nothing_but_torch():
    imports = re.findall(r'^(?:import|from) (\w+)', SOURCE, re.M)
    assert set(imports) - set(sys.stdlib_module_names) == {'torch'}, "others only where they are needed"

def built(*numbers):
    """A module of Part I, and of these sections of Part II with those that they say they need."""
    def with_needs(n):
        return {n}.union(*(with_needs(int(k)) for k in re.findall(r'\d+', (SECTIONS[n][2] or '').partition(';')[0])))
    ends = [*[m.start() for m in SECTIONS.values()][1:], SOURCE.index("if __name__ == '__main__'")]
    shared = SOURCE[CUT:SECTIONS[8].start()] if numbers else ''       # what Part II imports, and `patch`
    parts = [SOURCE[SECTIONS[n].start():ends[n - 1]] for n in sorted(set().union(*map(with_needs, numbers)))]
    module = types.ModuleType('built')
    exec(compile(SOURCE[:CUT] + shared + ''.join(parts), 'built', 'exec'), vars(module))
    return module

def train_on_a_line(m, **kwargs):
    """Train for two epochs with the module `m`; the learner."""
    dls = m.DataLoaders.from_tensors(*line_data(), valid=line_data(24, 1), bs=16, device='cpu')
    learn = m.Learner(dls, Line(), F.mse_loss, lr=0.1, metrics=F.l1_loss, **kwargs)
    learn.fit(2)
    assert learn.final_record[1] < 10, "it has learnt the line"
    return learn

def test_part_one_alone_is_a_complete_trainer(capsys):
    assert [*SECTIONS] == list(range(1, len(SECTIONS) + 1)) and CUT < SECTIONS[8].start(), "a banner has one form"
    train_on_a_line(built())
    assert [row[:4] for row in capsys.readouterr().out.splitlines()] == ['[0, ', '[1, '], "it prints a row an epoch"

USES = {
    8: lambda m, learn, folder: learn.no_logging().__enter__(),
    9: lambda m, learn, folder: (learn.fit_one_cycle(1), learn.lr_find(num_it=8, show_plot=False)),
    10: lambda m, learn, folder: (learn.validate(), learn.get_preds(), learn.predict(torch.ones(1))),
    11: lambda m, learn, folder: (learn.save(folder / 'm'), learn.load(folder / 'm')),
    12: lambda m, learn, folder: (learn.unfreeze(), learn.fit(1)),
    13: lambda m, learn, folder: train_on_a_line(m, opt_func=torch.optim.AdamW),
    14: lambda m, learn, folder: learn.fit(1, cbs=[m.GradientClip, m.GradientAccumulation(32), m.EarlyStoppingCallback,
                                                   m.SaveModelCallback(fname=folder / 'best')]),
    15: lambda m, learn, folder: learn.to_bf16().fit(1),
    16: lambda m, learn, folder: [learn.fit(1, cbs=m.CheckpointCallback(folder / 'run')) for _ in range(2)],
    17: lambda m, learn, folder: learn.distrib_ctx(),
    18: lambda m, learn, folder: learn.fit(1),
    19: lambda m, learn, folder: (learn.fit(1), learn.recorder.plot_loss(), learn.show_training_loop()),
    20: lambda m, learn, folder: m.small_cnn()(m.mnist1d(10)[0][0])}

@pytest.mark.parametrize('n', [n for n in SECTIONS if n > 7])
def test_each_section_of_part_two_works_with_part_one_and_what_it_needs(n, tmp_path):
    module = built(*[n, 11][:1 + (n == 14)])       # to save the best, 14 needs 11
    USES[n](module, train_on_a_line(module), tmp_path.resolve())
    __import__('matplotlib.pyplot').pyplot.close('all')

def test_demo_trains_and_says_how_well_it_went(tmp_path, capsys):
    import matplotlib.pyplot as plt
    plt.close('all')
    score, samples = ml.demo(1, 3, tmp_path), plt.gcf().axes
    assert 0.5 < score <= 1 and f'test accuracy {score:.1%}' in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / 'minilearner_demo.png').read_bytes()[1:4] == b'PNG'
    assert len(samples) == 9 and all(re.fullmatch(r'\d\n\d', ax.get_title()) for ax in samples), "target, prediction"
    plt.close('all')
    assert sum(p.numel() for p in ml.small_cnn().parameters()) == 24154, "as documented: no bias before batch norm"

def test_orders_stay_as_they_are():
    orders = {ml.TrainEvalCallback: -10, ml.MixedPrecision: -4, ml.Callback: 0, ml.Recorder: 50, ml.ParamScheduler: 60,
              ml.TrackerCallback: 60, ml.CheckpointCallback: math.inf}
    assert {cb: cb.order for cb in orders} == orders, "users place callbacks between these: they may not move"

@needs_readme
def test_readme_shows_what_its_example_really_prints(capsys):
    code, output = re.findall(r'```(?:python)?\n(.*?)```', README, re.S)[:2]
    exec(compile(code, 'README.md', 'exec'), {})
    shown, got = output.splitlines(), capsys.readouterr().out.splitlines()
    assert got[0] == shown[0] and len(got) == 11 and len(shown) == 3, "the titles and the last two of ten epochs"
    for a, b in zip(shown[1:], got[-2:]):       # processors differ, but not by much
        a, b = ([float(cell) for cell in row.split()[:-1]] for row in (a, b))
        assert a == pytest.approx(b, abs=0.05)

@needs_readme
def test_readme_snippets_run():
    learn = line_learner()
    for code in [code for code in PYTHON_IN_README[1:] if 'distrib_ctx' not in code]:
        exec(inspect.cleandoc(code), {'ml': ml, 'nn': nn, 'learn': learn})
    assert len(learn.recorder.losses) == 4, "the README's callbacks train for an epoch of four batches"

@pytest.fixture(scope='session')
def readme_started(background, tmp_path_factory):
    """README's first example with its last lines for several processes, in two of them."""
    folder = tmp_path_factory.mktemp('readme')
    first, (last,) = PYTHON_IN_README[0].splitlines(), [code for code in PYTHON_IN_README if 'distrib_ctx' in code]
    code = '\n'.join([*first[:-1], inspect.cleandoc('\n' + last)]).replace(", device='cpu'", '').replace('(10,', '(1,')
    (folder / 'script.py').write_text(code)
    return background(sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2,
                              'script.py', cwd=folder)

@needs_readme
def test_readme_script_runs_in_several_processes(readme_started):
    done = outcome(readme_started)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, "the first one prints: header, row"

@needs_tutorial
def test_tutorial_and_its_answers_run_from_top_to_bottom(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, 'show', lambda: plt.close('all'))
    variables = {}
    for i, cell in enumerate(json.loads(TUTORIAL.read_text(encoding='utf-8'))['cells']):
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            exec(compile(text.replace('FAST = False', 'FAST = True'), f'cell {i} of tutorial.ipynb', 'exec'), variables)
            assert not [out for out in cell['outputs'] if out['output_type'] == 'error' or out.get('name') == 'stderr']
        folded = ''.join(re.findall('<details>.*?</details>', text, re.S))
        for answer in re.findall('```python\n(.*?)```', folded, re.S):
            exec(compile(answer, f'an answer in cell {i} of tutorial.ipynb', 'exec'), dict(variables))
    plt.close('all')

# =============================================================================================
promises("The course: handouts, the guide and the commands")

EVERY = [name for one in LESSONS for name in one.exercises]

def bodies(source):
    return {name: ast.unparse(node.body) for name, node in defined(source).items()}

def without_bodies(source, names):
    tree = ast.parse(source)
    for name, node in functions(tree):
        if name in names:
            node.body = node.body[:ast.get_docstring(node) is not None]
    return ast.dump(tree)

def test_every_exercise_is_a_function_of_one_lesson_with_a_hint():
    assert len(set(EVERY)) == len(EVERY) and set(EVERY) <= bodies(SOURCE).keys()
    for one in LESSONS:
        assert all([one.goal, one.predict, one.read, one.minutes, *one.exercises.values()]), one.title
        assert f'run_{one.n}' in globals(), f"lesson {one.n} ends with something to run"

def test_run_shows_numbers_beside_what_to_expect(monkeypatch, capsys):
    monkeypatch.setitem(globals(), 'run_1', lambda: [('callbacks', len(ml.defaults.callbacks), 0., 0.)])
    run('1')
    assert re.fullmatch(r'callbacks +0   expected: 0.0 to 0.0\n', capsys.readouterr().out), "those of lesson 1"

def test_blanks_change_bodies_and_nothing_else():
    blanked = blank(SOURCE, EVERY)
    assert without_bodies(blanked, EVERY) == without_bodies(SOURCE, EVERY), "all other code stays"
    assert len(BLANK.findall(blanked)) == len(EVERY) and not BLANK.search(SOURCE)
    exec(compile(blanked, 'blank', 'exec'), {'__name__': 'blank'})      # no blank is called on import

def test_blank_copes_with_any_layout(monkeypatch):
    monkeypatch.setattr(LESSONS[0], 'exercises', {'f': '', 'A.g': ''})
    raises = 'raise NotImplementedError("lesson 1: write '
    source = ('def f(x: dict = {1: 2}): return x  # away\n'
              'class A:\n    @property\n    def g(self):\n        """Döc."""; y = 1\n        return y\n'
              '        # a remark on y\n\n    h = 1\n@patch\ndef g(self: A): return 2\n')
    assert blank(source, ['f', 'A.g']) == (
        f'def f(x: dict = {{1: 2}}): {raises}f")\n'
        f'class A:\n    @property\n    def g(self):\n        """Döc."""\n        {raises}A.g")\n'
        '\n    h = 1\n@patch\ndef g(self: A): return 2\n'), "of two functions of a name, the first"

def test_handouts_go_only_where_they_disturb_nothing(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    assert 'not empty' in handout(tmp_path), "nothing is overwritten"
    assert 'inside of the repository' in handout(HERE / 'exercise'), "its tests would disturb the repository's"
    assert 'no lesson or exercise 99' in handout(tmp_path / 'new', '1', '99'), "named, not passed over"
    assert [file.name for file in tmp_path.iterdir()] == ['notes.txt'], "a refusal leaves nothing behind"
    assert 'no such file' in grade(tmp_path / 'nobody.py')

@pytest.mark.parametrize('words, lessons', [((), range(1, N_CORE + 1)), (('all',), range(1, 99)), (('1', '2'), (1, 2)),
                                            (('fit_plain', '2'), (1, 2))])
def test_a_handout_has_its_lessons_and_the_guide_alone(tmp_path, words, lessons):
    assert handout(tmp_path / 'a', *words) is None
    chosen = {name for one in LESSONS if one.n in lessons for name in one.exercises}
    if 'fit_plain' in words:
        chosen -= set(LESSONS[0].exercises) - {'fit_plain'}
    text, code = ((tmp_path / 'a' / name).read_text(encoding='utf-8') for name in (NAME, FILE.name))
    assert {name for name, body in bodies(code).items() if BLANK.search(body)} == chosen
    numbers = [int(n) for n in re.findall(r'^lesson\((\d+)', text, re.M)]
    assert numbers == [one.n for one in LESSONS if one.n in lessons] and not re.search(r'^promises\(', text, re.M)
    assert 'FAST_STEPS = set()' in code and f'HANDED = {sorted(chosen)!r}' in text and 'class Guide' in text

def test_the_panel_is_drawn_for_every_test_that_may_wait(monkeypatch):
    found, written = {name: (line, True) for name, (line, _) in tasks(*LESSONS).items()}, []
    monkeypatch.setitem(globals(), 'tasks', lambda *lessons: found)
    out = types.SimpleNamespace(write_line=lambda text, **style: written.append(text))
    for name, function in [(k, v) for k, v in globals().items() if k.startswith('test_') and number(v)]:
        guide, one = Guide(), lesson_of(inspect.unwrap(function))
        guide.failed, guide.needs, written[:] = [types.SimpleNamespace(function=function)], [*one.exercises][-1], []
        guide.show_task(out, one)
        text = '\n'.join(written)
        assert all(word in text for word in (one.goal, one.predict, f'def {name}(', one.exercises[guide.needs]))

def pytest_in(folder, *args):
    """What pytest says in a folder, and its exit status."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')}
    done = subprocess.run([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *args], cwd=folder, env=env,
                          capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr, done.returncode

def write_answers(folder, blanks, **bodies):
    """The file of a student who has still to write `blanks`, and has written these `bodies` for others."""
    text = blank(SOURCE, [*blanks, *bodies])
    for name, body in bodies.items():
        text = text.replace(f'raise NotImplementedError("lesson 1: write {name}")', body)
    (folder / FILE.name).write_text(text, encoding='utf-8')

def test_a_lesson_that_is_done_opens_the_next_one(tmp_path):
    handout(tmp_path, '1', '2')
    shutil.copytree(tmp_path, tmp_path / 'stray')
    first, second = LESSONS[:2]
    write_answers(tmp_path, second.exercises)
    said, status = pytest_in(tmp_path)
    assert status == 1, f"not done, even if nothing is red: {said}"
    assert re.search(rf'1  {first.title} +done +see it: python {NAME} run 1', said)
    assert re.search(rf'2  {second.title} +0 of \d+ tests pass', said)
    assert second.goal in said and all(f'{name}: {hint}' in said for name, hint in second.exercises.items())
    assert '3 wait' in said and 'FAILURES' not in said, "what is only not written yet is not red"

def test_wrong_answers_get_hints_and_endless_loops_are_stopped(tmp_path):
    handout(tmp_path, '1')
    write_answers(tmp_path, ['fit_plain', 'map_tensors'], **{'TensorLoader.__iter__': 'while True: pass'})
    tests = tmp_path / NAME
    text = tests.read_text(encoding='utf-8')
    tests.write_text(re.sub('^PATIENCE = .*', 'PATIENCE = 4', text, flags=re.M), encoding='utf-8')
    said, status = pytest_in(tmp_path, '-k', 'lesson01 and (tensor_loader or split_batch)')
    assert status == 1 and 'stopped after 4 seconds in __iter__, line' in said, said
    hint = LESSONS[0].exercises['TensorLoader.__iter__']
    assert f"TensorLoader.__iter__: {hint}" in said, "a hint also after a wrong answer"
    assert re.search(r'look +minilearner.py:\d+ +TensorLoader.__iter__', said), "and where to go"
    assert '1 failed, ' in said and '3 locked' in said, "after an endless loop, no other one is tried"

def test_grade_gives_points_by_lesson(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(globals(), 'N_CORE', 1)
    handout(tmp_path, '1')
    write_answers(tmp_path, ['TensorLoader.__iter__', 'DataLoaders.split_batch'], map_tensors='return b')
    capsys.readouterr()
    assert grade(tmp_path, '--json') is True, "points are missing: a command that fails"
    graded = json.loads(capsys.readouterr().out)
    n_tests = len([k for k, v in globals().items() if k.startswith('test_') and number(v) == 1])
    points = {'score': 3, 'max_score': n_tests}     # fit_plain has three tests
    tests = [{'name': f'1 {LESSONS[0].title}', **points}]
    assert graded == {'file': str(tmp_path / FILE.name), **points, 'tests': tests}

# =============================================================================================
# The guide: what pytest says in a handout, and `python test_minilearner.py COMMAND`

def defined(source):
    """{name with its class: node} of the functions of a module; the first of a name, which Part II may replace."""
    return dict(reversed([*functions(ast.parse(source))]))

def functions(node, prefix=''):
    """(name with its class, node) of the functions of a module or class; of those with @patch, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from functions(child, f'{prefix}{child.name}.')
        if isinstance(child, ast.FunctionDef):
            is_method = any(ast.unparse(d) == 'patch' for d in child.decorator_list)
            owner = f'{ast.unparse(child.args.args[0].annotation)}.' if is_method else prefix
            yield owner + child.name, child

def start_of_body(node, lines, tokens):
    """Where the body of a function begins: (line, column), after its docstring if it has one."""
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        return doc.end_lineno, len(lines[doc.end_lineno - 1].encode()[:doc.end_col_offset].decode())
    depth = 0
    for token in tokens:            # the colon that ends `def f(...):`
        if token.start >= (node.lineno, 0) and token.type == tokenize.OP:
            depth += (token.string in '([{') - (token.string in ')]}')
            if token.string == ':' and not depth:
                return token.end

def end_of_body(node, lines):
    """Its last line, with the comments behind it that are indented like the body: they may give it away."""
    end = node.end_lineno
    for i, text in enumerate(lines[end:], end + 1):
        indent = len(text) - len(text.lstrip())
        if text.strip() and (text.lstrip()[0] != '#' or indent <= node.col_offset):
            break
        end = i if text.strip() else end
    return end

def blank(source, names):
    """`source` where the bodies of the exercises `names` raise; all else to the letter."""
    home = {name: one.n for one in LESSONS for name in one.exercises}
    lines = io.StringIO(source).readlines()         # splitlines would cut at form feeds, too
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for name, node in sorted(defined(source).items(), key=lambda pair: -pair[1].lineno):
        if name in names:
            line, column = start_of_body(node, lines, tokens)
            own_line = node.body[-1].lineno > line or ast.get_docstring(node) is not None
            gap = '\n' + ' ' * (node.col_offset + 4) if own_line else ' '
            text = f'raise NotImplementedError("lesson {home[name]}: write {name}")\n'
            lines[line - 1:end_of_body(node, lines)] = [lines[line - 1][:column] + gap + text]
    return ''.join(lines)

def lessons_alone(names):
    """This file with the lessons of the exercises `names` and the guide, without the promises."""
    head, *blocks = re.split(r'^(?=# ={80})', TESTS, flags=re.M)
    wanted = {one.n for one in LESSONS if set(one.exercises) & set(names)}
    kept = [block for block in blocks[:-1] if int((re.search(r'^lesson\((\d+)', block, re.M) or [0, 0])[1]) in wanted]
    head = head.replace('HANDED = None', f'HANDED = {sorted(names)!r}', 1)
    return ''.join([head, *kept, blocks[-1]])

def tasks(*lessons):
    """{name: (line, whether it is still blank)} of the exercises of lessons, in the order in which they list them."""
    text = FILE.read_text(encoding='utf-8')
    found = defined(text)
    return {name: (found[name].lineno, bool(BLANK.search(ast.get_source_segment(text, found[name]))))
            for one in lessons for name in one.exercises if name in found}

def blank_behind(error):
    """(lesson, name) of the blank that an error, or what it came from, is about; None if none is."""
    while error is not None:
        if isinstance(error, NotImplementedError) and (found := BLANK.search(str(error))):
            return int(found[1]), found[2]
        error = error.__cause__ or error.__context__

class Guide:
    """The pytest plugin of a handout: one lesson at a time, up to three failures, and what to do next."""

    def __init__(self):
        self.failed, self.needs, self.to_mend, self.results, self.is_over = [], None, [], {}, False
        self.first_blank = math.inf     # the first lesson, of those that run, that has a blank

    def pytest_itemcollected(self, item):
        if isinstance(item, pytest.Function):       # not the doctests of --doctest-modules
            item.extra_keyword_matches.add(f'lesson{number(item):02}')

    @pytest.hookimpl(trylast=True)      # after pytest-randomly, and after -k
    def pytest_collection_modifyitems(self, config, items):
        if HANDED is not None:
            if config.option.tbstyle == 'auto':
                config.option.tbstyle = 'short'
            items[:] = [item for item in items if isinstance(item, pytest.Function)]
            items.sort(key=lambda item: (number(item), inspect.unwrap(item.function).__code__.co_firstlineno))
            lessons = map(lesson_number, {*map(number, items)} - {0})
            self.first_blank = min((one.n for one in lessons if any(b for _, b in tasks(one).values())),
                                   default=math.inf)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if HANDED is None:
            return
        failed = {inspect.unwrap(other.function) for other in self.failed}      # cases of a test count once
        if number(item) > min([self.first_blank, *map(number, failed)]) or self.is_over or \
                len(failed) >= 3 and inspect.unwrap(item.function) not in failed:
            pytest.skip('locked')

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = (yield).get_result()
        if HANDED is not None and report.failed:
            self.failed.append(item)
            self.explain(report, item, call.excinfo)

    def explain(self, report, item, excinfo):
        """Say in a few lines what failed, and what helps."""
        one, found = lesson_of(item.function), blank_behind(excinfo.value)
        if found:
            n, name = found
            self.needs = self.needs or name
            line = tasks(lesson_number(n)).get(name, ('?',))[0]
            report.longrepr = f'to write: {name} (minilearner.py:{line})'
            if not IN_WORKER:   # not wrong, only not written: no red; the exit status says it, see below
                line = inspect.unwrap(item.function).__code__.co_firstlineno
                report.outcome, report.longrepr = 'skipped', (__file__, line, report.longrepr)
            return
        self.is_over = getattr(excinfo.value, 'pytrace', True) is False         # `stopped` says it all
        if item.config.option.tbstyle == 'short' and not self.is_over:          # only frames of the two files
            ours = {FILE, Path(__file__).resolve()}
            report.longrepr = excinfo.getrepr(style='short', tbfilter=lambda info: info.traceback.filter(
                lambda frame: Path(frame.path).resolve() in ours) or info.traceback)
        hints_of = {name: hint for other in LESSONS if other.n <= one.n for name, hint in other.exercises.items()}
        codes = [frame.frame.code.raw.co_qualname for frame in excinfo.traceback if frame.path == FILE]
        called = [code.split('.<locals>')[0] for code in codes]         # one with @patch lacks its class
        known = [name for code in called for name in hints_of if code in (name, name.split('.')[-1])]
        known = [name for name in known if name in one.exercises][-2:] + known[-1:]
        if not known:       # it came to its end, and the test did not like what it saw
            used = words(item.function) - {'Learner', 'Optimizer'}
            known = [name for name in one.exercises if name.split('.')[0] in used] or \
                    [name for name in one.exercises if name.split('.')[-1] in used]
        known = [name for name in dict.fromkeys(known) if name not in self.to_mend]
        hints = [f'{name}: {hints_of[name]}' for name in known]
        self.to_mend += known
        if lost := [name for name in one.exercises if name not in tasks(one)]:
            hints = [f"minilearner.py has no {', '.join(lost)} any more: was it renamed or deleted?"]
        if hints:       # once each
            report.sections.append(('what helps', '\n'.join(hints)))

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition('::')[2]
        function = globals().get(name.partition('[')[0])
        if function is not None and (report.when == 'call' or not report.passed):
            waits = 'to write: ' in str(report.longrepr)
            self.results.setdefault(number(function), {})[name] = 'waits' if waits else report.outcome

    def pytest_report_teststatus(self, report):
        if report.skipped and 'locked' in str(report.longrepr):
            return 'locked', '', 'LOCKED'
        if report.skipped and 'to write: ' in str(report.longrepr):
            return 'wait', 'w', ('WAITS', {'yellow': True})

    def pytest_sessionfinish(self, session, exitstatus):
        if self.failed and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter):
        yield       # so that the map comes after all that pytest has to say
        if HANDED is not None and any(self.results.values()):
            self.draw_map(terminalreporter)

    def draw_map(self, out):
        """Lessons done, the one to work on, and those that are locked, in a few lines."""
        tried = {n: results for n, results in self.results.items() if results and n}
        open_ones = [n for n, results in tried.items() if {*results.values()} - {'passed', 'skipped'}]
        here = min(open_ones, default=None)
        out.section('you are here', '-')
        for one in [one for one in LESSONS if one.n in tried and (here is None or one.n < here)]:
            out.write_line(f'  {one.n}  {one.title:30} done      see it: python {NAME} run {one.n}', green=True)
        if here is None:
            return out.write_line('All tests of these lessons pass.', green=True, bold=True)
        one, results = lesson_number(here), tried[here]
        passed = sum(result == 'passed' for result in results.values())
        out.write_line(f'  {one.n}  {one.title:30} {passed} of {len(results)} tests pass', bold=True, yellow=True)
        later = [str(other.n) for other in LESSONS if other.n > here]
        if later:
            out.write_line(f"  locked until then: {', '.join(later)}")
        self.show_task(out, one)

    def show_task(self, out, one):
        """The goal, what is still to write (first what the tests need first), and the test that waits."""
        out.write_line(f'\n{one.title}: {one.goal}')
        out.write_line(f'time: an AI student took {one.tried} minutes; a person takes longer, plan {one.minutes}')
        out.write_line(f'predict first: {one.predict}\nread: {one.read}\n')
        todo = tasks(*[other for other in LESSONS if other.n <= one.n])
        for name in [name for name in self.to_mend if name in todo and not todo[name][1]]:
            out.write_line(f'  look   minilearner.py:{todo[name][0]:<5} {name}, or what you wrote last', bold=True)
        for name in sorted(one.exercises, key=lambda name: name != self.needs):
            if name in todo and todo[name][1]:
                hint = f'{name}: {one.exercises[name]}'
                out.write_line(f'  write  minilearner.py:{todo[name][0]:<5} {hint}', bold=name == self.needs)
        out.write_line(f'  then   pytest, or for this lesson alone: pytest -k lesson{one.n:02}\n')
        for item in sorted(self.failed, key=number)[:1]:
            out.write_line(f'The test that waits, {NAME}:{inspect.unwrap(item.function).__code__.co_firstlineno}:\n')
            out.write_line(source_of(item.function))
            names = {node.id for node in ast.walk(ast.parse(source_of(item.function))) if isinstance(node, ast.Name)}
            names -= {*inspect.unwrap(item.function).__code__.co_varnames}      # what it defines itself
            used = [f'{name} (line {HELPERS[name]})' for name in sorted(names & HELPERS.keys())]
            out.write_line(f"\nIt uses {', '.join(used)}.\n" if used else '')

def lesson_number(n):
    return next(one for one in LESSONS if one.n == n)

def source_of(function):
    return inspect.getsource(inspect.unwrap(function)).rstrip()

def words(function):
    """The names that a test uses."""
    return {getattr(node, 'id', getattr(node, 'attr', '')) for node in ast.walk(ast.parse(source_of(function)))}

def number(item):
    """The lesson of a test or test function; 0 if it is a promise."""
    return lesson_of(getattr(item, 'function', item)).n

def pytest_generate_tests(metafunc):
    """The only hook that pytest calls in a test module; early enough to bring in the others."""
    manager = metafunc.config.pluginmanager
    if not manager.has_plugin('guide'):
        manager.register(Guide(), 'guide')

def handout(folder, *wanted):
    """Write an exercise into `folder`: the core; or `all`; or lessons by number, functions by name."""
    folder = Path(folder).resolve()
    if HANDED is not None:
        return "this is a handout already"
    if HERE == folder or HERE in folder.parents:
        return f"{folder} is inside of the repository, whose own tests it would disturb: choose another place"
    if folder.exists() and any(folder.iterdir()):
        return f"{folder} is not empty, and nothing is overwritten: choose another place"
    names = []
    for word in wanted or ['core']:
        chosen = [name for one in LESSONS for name in one.exercises
                  if word in ('all', str(one.n), name) or word == 'core' and one.n <= N_CORE]
        if not chosen:
            return f"no lesson or exercise {word}: there are lessons 1 to {len(LESSONS)}, and names such as Learner.fit"
        names += chosen
    folder.mkdir(parents=True, exist_ok=True)
    text = '# An exercise: pytest says what is next\n' + blank(SOURCE, names)
    # section 18 runs the step functions on many tensors at once, which is not for every way of writing them
    text = re.sub(r'FAST_STEPS = {[^}]*}', 'FAST_STEPS = set()', text)
    (folder / FILE.name).write_text(text, encoding='utf-8', newline='\n')
    (folder / NAME).write_text(lessons_alone(names), encoding='utf-8', newline='\n')
    (folder / '.pytest.ini').write_text(f'[pytest]\ntestpaths = {NAME}\n')
    print(f"{len(set(names))} exercises. Next: cd {folder}, then pytest")

def run(n):
    """Train on MNIST-1D with what lesson `n` was about, and show the numbers beside what to expect."""
    ml.defaults.callbacks = callbacks_of(int(n))
    for what, value, low, high in globals()[f'run_{n}']():
        print(f'{what:50} {value:.3g}   expected: {low} to {high}')

class Tell:
    """A pytest plugin that writes each result to a file at once: a test that hangs loses only itself."""

    def __init__(self, file):
        self.say = functools.partial(print, file=open(file, 'a', encoding='utf-8'), flush=True)

    def pytest_runtest_logreport(self, report):
        if report.failed or report.when == 'call':
            self.say('failed' if report.failed else 'passed', report.nodeid)

def tell(log, *args):
    return pytest.main([*args, NAME], plugins=[Tell(log)])

def outcomes(source, names):
    """Run the lessons of `names` on `source` in another process: {lesson: {test: whether all its cases passed}}."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, 'log')
        Path(folder, FILE.name).write_text(source, encoding='utf-8', newline='\n')
        Path(folder, NAME).write_text(lessons_alone(names), encoding='utf-8', newline='\n')
        log.write_text('')
        command = [sys.executable, NAME, 'tell', str(log), '-q', '--tb=no', '-p', 'no:guide',
                   '-p', 'no:cacheprovider', '-c', os.devnull]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        try:
            process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            kill_all(process)
        cases = {}
        for line in log.read_text(encoding='utf-8').splitlines():
            word, _, case = line.partition(' ')
            cases[case.partition('::')[2]] = word == 'passed'
    passed = collections.defaultdict(list)
    for case, is_good in cases.items():
        passed[case.partition('[')[0]].append(is_good)
    tests = [(k, number(v)) for k, v in globals().items() if k.startswith('test_')]     # also those that did not run
    return {one.n: {test: all(passed[test] or [False]) for test, n in tests if n == one.n}
            for one in LESSONS if set(one.exercises) & set(names)}

def grade(*files):
    """Points of each file, a lesson for a line, or as JSON; the code in it runs, as it is."""
    names = [name for one in LESSONS if one.n <= N_CORE for name in one.exercises]
    paths, graded = [Path(word) for word in files if word != '--json'], []
    paths = [path / FILE.name if path.is_dir() else path for path in paths]
    if not all(path.is_file() for path in paths) or not paths:
        return f"no such file: {[str(path) for path in paths if not path.is_file()]}"
    for path in paths:
        results = outcomes(path.read_text(encoding='utf-8'), names)
        tests = [{'name': f'{n} {lesson_number(n).title}', 'score': sum(passed.values()), 'max_score': len(passed)}
                 for n, passed in results.items()]
        graded.append({'file': str(path), 'score': sum(t['score'] for t in tests),
                       'max_score': sum(t['max_score'] for t in tests), 'tests': tests})
        if '--json' not in files:
            print(f"{path}: {graded[-1]['score']} of {graded[-1]['max_score']} points")
            print(*(f"    {t['name']:40} {t['score']:3} of {t['max_score']}" for t in tests), sep='\n', flush=True)
    if '--json' in files:
        print(json.dumps(graded if len(graded) > 1 else graded[0], indent=1))
    return any(one['score'] < one['max_score'] for one in graded)       # the exit status

def check(full=''):
    """Say whether the lessons can be solved in order; `full` really runs them, for every prefix."""
    wrong, every = [], [name for one in LESSONS for name in one.exercises]
    for k in range(len(LESSONS) + 1) if full else [0, len(LESSONS)]:
        results = outcomes(blank(SOURCE, [name for one in LESSONS[k:] for name in one.exercises]), every)
        for n, tests in results.items():
            failed = [test for test, passed in tests.items() if not passed]
            wrong += [f"with lessons 1 to {k} written, {test} of lesson {n} fails" for test in failed if n <= k]
            if n > k and not failed or not tests:
                wrong.append(f"with lessons 1 to {k} written, lesson {n} passes")
        print(f"lessons 1 to {k} written: {len(wrong)} findings", flush=True)
    print(*wrong or [f"sound: {len(LESSONS)} lessons, {len(every)} exercises"], sep='\n')
    return bool(wrong)

HELPERS = {node.name: node.lineno for node in ast.parse(TESTS).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
           and not node.name.startswith(('test_', 'run_', 'pytest_'))}      # what a test may use

if __name__ == '__main__':
    commands = {'handout': handout, 'run': run, 'grade': grade, 'check': check, 'tell': tell}
    command, *words_ = sys.argv[1:] or ['']
    sys.exit(commands[command](*words_) if command in commands else
             pytest.main([str(Path(__file__)), *sys.argv[1:]]))

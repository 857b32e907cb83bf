# SPDX-License-Identifier: MIT
"""minilearner: the fastai Learner, rebuilt from scratch in one readable file.

    train, test = mnist1d()             # of Part II, as is small_cnn
    dls = DataLoaders.from_tensors(*train, valid=test)
    learn = Learner(dls, small_cnn(), nn.CrossEntropyLoss(), metrics=accuracy)
    learn.fit_one_cycle(5, 1e-2)        # of Part II; Part I has learn.fit

Part I is a complete trainer: a plain loop, then one tool after another that replaces a
hard-coded piece of it. Part II is the rest of fastai's Learner. Part I knows nothing of
Part II, whose sections plug in as your own code can: by callbacks, and by `@patch`,
which adds a method to a class. A section needs Part I and the sections that it names.

PART I  The Learner, from scratch     PART II  The rest of fastai's Learner
1  The plain loop                      8  Shared           14  A shelf of callbacks
2  Events and callbacks                9  Schedules        15  Mixed precision
3  The Learner                        10  Inference        16  Checkpoints
4  Metrics                            11  Saving           17  Many processes
5  Recorder                           12  Transfer         18  Speed
6  Data                               13  More optimizers  19  Pictures, progress
7  Optimizer                                               20  Demo

Words (B is the batch size, C the number of classes)
    xb, yb      inputs and targets of a batch, always tuples: `model(*xb)`
    x, y        the same, without the tuple if it has one element
    pred, loss  `model(*xb)`, and `loss_func(pred, *yb)`, 0-d in training
    ds, dl, dls a data set; a loader of batches; a `DataLoaders`
    group       parameters (say, the head) with their `hyper`, {'lr': 0.1, 'mom': 0.9}
    wd, mom     weight decay, momentum; `sqr_mom` is that of the squared gradients
    state       what is remembered of one parameter: `{'grad_avg': tensor, 'step': 3}`
    cb, cbs     a callback, an object with methods named after events; a list of them
    n_epoch     epochs of this fit: each trains on all data once, then validates
    n_iter      batches of this pass over a loader
    pct_train   the share of the fit that is done, from 0.0 to 1.0
Sources: fastai's documentation, fastbook chapters 16 and 19, the papers named below.
"""
import copy
import dataclasses
import difflib
import re
import time
import types
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, partialmethod
from operator import length_hint
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import data as data_tools

# PART I: The Learner, from scratch
# --------------------------------------------------------------------------------------
# 1. The plain loop: everything below replaces one hard-coded part of it
# --------------------------------------------------------------------------------------
def fit_plain(model, train, valid, loss_func, opt, n_epoch):
    """Train `model` with a hand-written loop.

    train, valid: lists or loaders of batches `(xb, yb)`; opt: a torch optimizer, say.
    Returns: the validation loss of each epoch, a mean over all samples; floats.
    """
    valid_losses = []
    for _ in range(n_epoch):                     # becomes Learner._all_epochs
        model.train()                            # TrainEvalCallback.before_train
        for xb, yb in train:                     # Learner.all_batches
            loss = loss_func(model(xb), yb)      # Learner._one_batch
            loss.backward()                      # Learner._train_step
            opt.step()                           # Optimizer.step
            opt.zero_grad()
        model.eval()                             # TrainEvalCallback.before_validate
        total, count = 0., 0                     # AvgLoss.reset
        with torch.no_grad():                    # Learner._one_epoch
            for xb, yb in valid:
                total += loss_func(model(xb), yb) * len(xb)      # AvgLoss.accumulate
                count += len(xb)
        valid_losses.append(float(total / count))                # Recorder.after_epoch
    return valid_losses

# 2. Events and callbacks: where your code steps into the loop
# --------------------------------------------------------------------------------------
# A part of the loop, such as a batch, fires before_batch when it begins and after_batch
# when it ends, also by an error. CancelBatchException, raised before after_batch, ends
# it early: after_cancel_batch comes, then after_batch. Elsewhere it is an error.
# Likewise for the other parts. after_create comes at the end of Learner.__init__.

def check(ok, message, error=ValueError):
    """Raise `error(message)` unless `ok`: how this file refuses bad input."""
    if not ok:
        raise error(message)

class event:
    """The events of a fit. EVENTS is read from this text; event.after_fit is a str.

    Start Fit
       - before_fit
      Start Epoch Loop
         - before_epoch
        Start Train
           - before_train
          Start Batch Loop
             - before_batch             xb and yb are there
             - after_pred               pred = model(*xb)
             - after_loss               loss = loss_func(pred, *yb), if there is a yb
             - before_backward          in training only, up to after_step
             - after_cancel_backward
             - after_backward           loss.backward() has made the gradients
             - before_step
             - after_cancel_step
             - after_step               opt.step(); the gradients are still there
             - after_cancel_batch
             - after_batch              opt.zero_grad() has removed them
          End Batch Loop
        End Train
         - after_cancel_train
         - after_train
        Start Valid
           - before_validate
          Start Batch Loop
             - **CBs same as train batch**
          End Batch Loop
        End Valid
         - after_cancel_validate
         - after_validate
      End Epoch Loop
       - after_cancel_epoch
       - after_epoch
    End Fit
     - after_cancel_fit
     - after_fit
    """

EVENTS = ('after_create', *re.findall(r'- (\w+)', event.__doc__))
BATCH_EVENTS = EVENTS[EVENTS.index('before_batch'):EVENTS.index('after_batch') + 1]
for _name in EVENTS:
    setattr(event, _name, _name)

class CancelException(Exception): "Ends a part of the loop early, without an error."
class CancelStepException(CancelException): "Skip the optimizer's step."
class CancelBackwardException(CancelException): "Skip the backward pass."
class CancelBatchException(CancelException): "Skip the rest of the batch."
class CancelTrainException(CancelException): "Skip the rest of the training pass."
class CancelValidException(CancelException): "Skip the rest of the validation pass."
class CancelEpochException(CancelException): "Skip the rest of the epoch."
class CancelFitException(CancelException): "End the training."

def breadth(error):
    """How much an exception ends: a Cancel by its place above, an error everything."""
    cancels = CancelException.__subclasses__()
    ranks = [i for i, cancel in enumerate(cancels) if isinstance(error, cancel)]
    return ranks[0] if ranks else len(cancels)

def check_event(name):
    """Raise AttributeError, naming the nearest event, unless `name` is an event."""
    if name not in EVENTS:
        near = difflib.get_close_matches(name, EVENTS, 1, 0)
        raise AttributeError(f"{name!r} is not an event; did you mean {near[0]!r}?")

def listify(o):
    """`o` as a new list: None is empty, a list or tuple its items, else one item."""
    if o is None:
        return []
    return list(o) if isinstance(o, (list, tuple)) else [o]

def class2attr(obj, suffix):
    """Class name in snake case, without suffix: MyClipCallback is 'my_clip'."""
    name = type(obj).__name__.removesuffix(suffix) or suffix
    return re.sub('(?<=[a-z0-9])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])', '_', name).lower()

class Callback:
    """Base class of callbacks: methods named after events (`EVENTS`), with only `self`.

        class Clip(Callback):
            def before_step(self):
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.)

    `Callback(before_step=f)` makes one from a function that takes the callback.
    What a callback lacks is looked up in its learner: `self.loss` is `self.learn.loss`;
    to change it there, write `self.learn.loss = ...`, as `self.loss = ...` warns.
    order: lower runs first; equal ones run in the order of adding.
    run_before, run_after: a callback class or a list of them; stronger than `order`.
    run: False skips all events; the end of the fit sets it back to True.
    run_train, run_valid: False skips only before_batch to after_batch in that phase.
    Raises: AttributeError for a method before_*, after_* or begin_* that is no event.
    """
    order, run_before, run_after = 0, (), ()
    run = run_train = run_valid = True
    learn = None

    def __init__(self, **handlers):
        for name, f in handlers.items():
            check_event(name)
            setattr(self, name, partial(f, self))

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in dir(cls):
            if re.match('(before|after|begin)_', name) and callable(getattr(cls, name)):
                check_event(name)

    def __call__(self, event_name):
        """Run the method `event_name` if it exists and the flags allow; its result."""
        training = getattr(self.learn, 'training', True)
        in_phase = self.run_train if training else self.run_valid
        is_wanted = self.run and (in_phase or event_name not in BATCH_EVENTS)
        if is_wanted and self.defines(event_name):
            return getattr(self, event_name)()

    def defines(self, name):
        """Whether the callback itself, not its learner, has the attribute `name`."""
        return name in vars(self) or hasattr(type(self), name)

    def __getattr__(self, k):
        # only called for what was not found; `hasattr(cb, event)` is about cb alone
        if k in EVENTS or k.startswith('__') or not hasattr(self.learn, k):
            raise AttributeError(f"neither {self!r} nor its learner has {k!r}")
        return getattr(self.learn, k)

    def __setattr__(self, k, v):
        learn = self.learn
        is_new = learn is not None and k not in vars(self) and not hasattr(Callback, k)
        if is_new and k != self.name and (k in vars(learn) or hasattr(type(learn), k)):
            text = f"You are shadowing an attribute ({k}) that exists in the learner. "
            warnings.warn(f"{text}Use `self.learn.{k}` to avoid this", stacklevel=2)
        super().__setattr__(k, v)

    def __repr__(self):
        return type(self).__name__

    name = property(lambda self: class2attr(self, 'Callback'))    # learn.<name> is self

def must_precede(a, b):
    """Whether callback `a` has to run before `b`, by `run_before` or `run_after`."""
    before, after = tuple(listify(a.run_before)), tuple(listify(b.run_after))
    return a is not b and (isinstance(b, before) or isinstance(a, after))

# 3. The Learner: a model, data, a loss, an optimizer, and the loop that joins them
# --------------------------------------------------------------------------------------
# What a Learner takes if it is given nothing. Sections 3 and 5 append their callbacks.
defaults = types.SimpleNamespace(lr=1e-3, callbacks=[])

class Learner:
    """Trains `model` on `dls`: holds the loop, in which callbacks do the rest.

    dls: a `DataLoaders`. model: an nn.Module, in which missing attributes are sought.
    loss_func: called as `loss_func(pred, *yb)`; default: `dls.train_ds.loss_func`.
    opt_func: called as `opt_func(params, lr=lr)`; default: `Adam`.
    lr: learning rate; default: `defaults.lr`; an `lr` in a `partial` opt_func wins.
    splitter: function from the model to a list of parameter groups; default: one group.
    cbs: callbacks or classes; default_cbs=False leaves out those of `defaults`.
    metrics: functions of `(pred, *yb)` or objects; see `mk_metric`.
    path, model_dir: files are saved in path/model_dir; default path: that of `dls`.
    wd: weight decay; default: that of the optimizer.
    wd_bn_bias: decay biases and norm layers, too (torch's optimizers always do).
    train_bn: False keeps norm layers whose parameters are all frozen in eval mode.
    moms: momentum at the start, peak and end of a one-cycle fit.

    In a batch, `xb, yb, pred, loss` are its inputs, targets, prediction and loss (until
    after_loss, that of the last one). pred and loss have graphs: detach what you keep.
    """
    def __init__(self, dls, model, loss_func=None, opt_func=None, lr=None,
                 splitter=None, cbs=None, metrics=None, path=None, model_dir='models',
                 wd=None, wd_bn_bias=False, train_bn=True, moms=(0.95, 0.85, 0.95),
                 default_cbs=True):
        check_parts(dls, model, loss_func, opt_func)
        self.dls, self.model = dls, model
        self.loss_func = dls.train_ds.loss_func if loss_func is None else loss_func
        self.opt_func, self.splitter = opt_func or Adam, splitter or trainable_params
        self.lr = defaults.lr if lr is None else lr
        self.wd, self.wd_bn_bias, self.train_bn = wd, wd_bn_bias, train_bn
        self.metrics = [mk_metric(m) for m in listify(metrics)]
        self.path, self.model_dir, self.moms = Path(path or dls.path), model_dir, moms
        self.logger, self.opt, self.training, self.failed = print, None, False, False
        self.epoch, self.n_epoch, self.train_iter, self.pct_train = 0, 1, 0, 0.
        self.iter, self.n_iter, self.completed = 0, 0, True
        self._forget_batch()
        self.loss, self._cbs, self._handlers = torch.tensor(0.), [], {}
        self.cbs = [*(defaults.callbacks if default_cbs else []), *listify(cbs)]
        self('after_create')

    # ---- the loop
    def fit(self, n_epoch, lr=None, wd=None, cbs=None, reset_opt=False, start_epoch=0):
        """Train for `n_epoch` epochs.

        lr, wd: see `Optimizer.set_hyper`; default: the Learner's, or the optimizer's.
        cbs: callbacks for this fit only. reset_opt: begin with a new optimizer.
        start_epoch: skip the epochs before it; schedules go on as if they had run.
        If an error ends the fit, `xb, yb, pred, loss` stay for your debugger.
        """
        ok = isinstance(n_epoch, int) and start_epoch in range(n_epoch + 1)
        check(ok, f"{n_epoch=}, {start_epoch=}: give ints, 0 <= start_epoch <= n_epoch")
        with self.added_cbs(cbs):
            opt = self.ensure_opt(reset_opt)
            opt.set_hyper('lr', self.lr if lr is None else lr)
            own_wd = [hyper.get('wd', 0.) for hyper in opt.hypers]
            for value in (self.wd, wd):
                if value is not None:
                    opt.set_hyper('wd', value)
            opt.zero_grad()    # an error in the last fit may have left gradients
            self.n_epoch, self.start_epoch = n_epoch, start_epoch
            try:
                self._stage('fit', self._all_epochs, CancelFitException)
                self._forget_batch()
            finally:
                if wd is not None:    # it was for this fit
                    opt.set_hyper('wd', own_wd)
                self.training, self.dl = False, None
                for cb in self.cbs:
                    cb.run = True

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
        self.n_iter = length_hint(self.dl)    # 0 if it does not tell
        for i, b in enumerate(self.dl):
            self.one_batch(i, b)

    def one_batch(self, i, b):
        """Train (if `self.training`) or evaluate on `b`, batch `i` of this pass."""
        self.iter, self.xb, self.yb, self.pred = i, b, (), None
        try:
            self.xb, self.yb = self.dls.split_batch(to_device(b, self.dls.device))
            self._stage('batch', self._one_batch, CancelBatchException)
        except Exception as error:
            error.add_note(where(self))
            raise

    def _one_batch(self):
        self.pred = self.call_model()
        self._fire('after_pred')
        if self.yb:
            self.loss = self.loss_func(self.pred, *self.yb)
            self._fire('after_loss')
            if self.training:
                self._train_step()

    def call_model(self):
        """The output of the model for `xb`; if it has `logits`, only these."""
        xb = self.xb
        pred = self.model(**xb[0]) if isinstance(xb[0], Keywords) else self.model(*xb)
        if isinstance(pred, Tensor):    # asked first, as it is what costs least
            return pred
        if isinstance(pred, Mapping):
            return pred.get('logits', pred)
        return getattr(pred, 'logits', pred)

    def _train_step(self):
        # before_backward may scale loss_grad, hence the lambda; loss is reported
        opt, self.loss_grad = self.opt or self.ensure_opt(), self.loss
        self._stage('backward', lambda: self.loss_grad.backward(),
                    CancelBackwardException)
        self._stage('step', opt.step, CancelStepException)
        opt.zero_grad()

    def _stage(self, name, body, cancel):
        """Fire before_<name>, run `body`, fire after_<name>; `cancel` ends it early.

        after_<name> comes in any case. In it, `self.completed` tells whether `body` ran
        to its end, and `self.failed` whether an exception other than `cancel` ended it.
        """
        completed, error = False, None
        try:
            try:
                self._fire(f'before_{name}')
                body()
                completed = True
            except cancel:
                self._fire(f'after_cancel_{name}')
        except BaseException as e:
            error = e
            raise
        finally:
            self.completed, self.failed = completed, error is not None
            self._fire(f'after_{name}', error)

    def _fire(self, name, error=None):
        """Call the callbacks that define `name`; of two errors, the broader wins."""
        if name not in self._handlers:
            self._handlers[name] = self.ordered_cbs(name)
        for cb in self._handlers[name]:
            try:
                if cb.learn is self:    # the one before may have removed it
                    cb(name)
            except BaseException as e:
                e.add_note(f"raised by the callback {cb!r} in {name}")
                if error is None or breadth(e) > breadth(error):
                    raise
                error.add_note(f"then {cb!r} raised {e!r} in {name}")

    def __call__(self, event_name):
        """Call an event, or a list of them, on the callbacks, in order."""
        self._handlers = {}    # a handler may have been set on a callback
        for name in listify(event_name):
            check_event(name)
            self._fire(name)

    def _forget_batch(self):
        self.xb = self.yb = (None,)
        self.dl = self.pred = self.loss = self.loss_grad = None

    data = property(lambda self: self.dls, doc="Another name for `dls`.")
    x = property(lambda self: detuplify(self.xb), doc="`xb`, without a tuple of one.")
    y = property(lambda self: detuplify(self.yb), doc="`yb`, without a tuple of one.")

    # ---- the optimizer
    def ensure_opt(self, reset=False):
        """The optimizer; a new one if `reset`, or to train what it was not made for."""
        opt, params = self.opt, {*trainable_params(self.model)}
        # an optimizer that you made yourself stays: its `made_for` is None
        is_ours = opt is not None and opt.made_for is not None
        if reset or opt is None or (is_ours and params - opt.made_for):
            self.create_opt()
        return self.opt

    def create_opt(self):
        """Make `self.opt` for the model, on its device, with splitter and opt_func."""
        lr = getattr(self.opt_func, 'keywords', {}).get('lr', self.lr)
        if self.lr not in (lr, defaults.lr):
            warnings.warn(f"lr={self.lr} is not used: opt_func has its own, {lr}")
        self.model.to(self.dls.device)    # first, so that its state lands there, too
        self.opt = self.new_opt(self.splitter(self.model), lr)
        self.lr = lr
        self.opt.set_hyper('lr', lr)
        self.opt.made_for = {*trainable_params(self.model)}.union(*self.opt.param_lists)
        for p in [] if self.wd_bn_bias else norm_bias_params(self.model):
            self.opt.state[p]['do_wd'] = False    # for weight_decay and l2_reg

    def new_opt(self, params, lr):
        """What `opt_func` makes. Section 13 replaces this: it wraps torch's."""
        return self.opt_func(params, lr=lr)

    # ---- its callbacks
    @property
    def cbs(self):
        """The callbacks, in the order of adding. Each is also `learn.<name>`."""
        return self._cbs

    @cbs.setter
    def cbs(self, cbs):
        """Register these callbacks, and no others; see `add_cbs`."""
        cbs = check_cbs(self, [o() if isinstance(o, type) else o for o in listify(cbs)])
        for cb in self._cbs:
            cb.learn = None
            vars(self).pop(cb.name, None)
        for cb in cbs:
            if cb.learn is not None:    # a callback serves one learner, the last one
                cb.learn.remove_cbs(cb)
            cb.learn, vars(self)[cb.name] = self, cb
        self._cbs, self._handlers = cbs, {}

    def add_cbs(self, cbs):
        """Register a callback, a class, or a list of these; returns the learner."""
        self.cbs = self._cbs + listify(cbs)
        return self

    def remove_cbs(self, cbs):
        """Remove callbacks, or all of a class, if present; returns the learner."""
        cbs = listify(cbs)
        kinds = {class_key(o) for o in cbs if isinstance(o, type)}
        self.cbs = [cb for cb in self._cbs if cb not in cbs
                    and kinds.isdisjoint(map(class_key, type(cb).__mro__))]
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

    def ordered_cbs(self, event):
        """The callbacks that define `event`, in the order in which they are called."""
        waiting, ordered = sorted(self.cbs, key=lambda cb: cb.order), []
        while waiting:
            free = [b for b in waiting if not any(must_precede(a, b) for a in waiting)]
            check(free, f"run_before and run_after of {waiting} contradict each other")
            ordered.append(waiting.pop(waiting.index(free[0])))
        return [cb for cb in ordered if cb.defines(event)]

    def __getattr__(self, k):
        # subtle: copy and pickle ask before __init__ ran, when there is no model either
        model = vars(self).get('model')
        if k.startswith('__') or not hasattr(model, k):
            near = difflib.get_close_matches(k, dir(type(self)), 1)
            raise AttributeError(f"Learner and model lack {k!r}; similar: {near}")
        return getattr(model, k)

    def __repr__(self):
        return f'Learner({self.dls!r}, {func_name(self.model)})'

def check_parts(dls, model, loss_func, opt_func):
    """Refuse what is easily mixed up when a Learner is made; see there."""
    check(isinstance(dls, DataLoaders), f"{type(dls)}: use DataLoaders()", TypeError)
    check(isinstance(model, nn.Module), f"{model=}: give an object, Net()", TypeError)
    loss_func = loss_func or getattr(dls.train_ds, 'loss_func', None)
    ok = callable(loss_func) and not isinstance(loss_func, type)
    check(ok, f"{loss_func=}: give, say, nn.MSELoss()", TypeError)
    check(callable(opt_func or Adam), f"{opt_func=}: give, say, SGD", TypeError)

def check_cbs(learn, cbs):
    """Check `cbs`; drop repeats, and those whose class a notebook has defined anew."""
    for cb in cbs:
        check(isinstance(cb, Callback), f"{cb!r} is not a Callback", TypeError)
    taken = {*dir(type(learn)), *vars(learn)} - {cb.name for cb in learn.cbs}
    kinds = {cb.name: type(cb) for cb in cbs}
    for cb in cbs:
        ok = cb.name not in taken and class_key(type(cb)) == class_key(kinds[cb.name])
        check(ok, f"{cb!r}: the name {cb.name!r} is taken; rename its class")
    return [cb for cb in dict.fromkeys(cbs) if type(cb) is kinds[cb.name]]

def class_key(cls):
    """What identifies a class: the same if a notebook's cell defines it anew."""
    # but a class that a function makes is another one each time
    return cls if '<locals>' in cls.__qualname__ else (cls.__module__, cls.__qualname__)

def tuplify(o):
    """A tuple as it is, anything else as a tuple of one."""
    return o if isinstance(o, tuple) else (o,)

def detuplify(t):
    """The element of a tuple that has one; any other tuple as it is."""
    return t[0] if len(t) == 1 else t

def func_name(f):
    """Name of a function, also of one inside a `partial`; of an object, its class's."""
    f = getattr(f, 'func', f)
    return getattr(f, '__name__', class2attr(f, 'Metric'))

def where(learn):
    """The note on an error in a batch: its number, and the tensors in it."""
    phase = 'training' if learn.training else 'validation'
    tensors = tensors_in([learn.xb, learn.yb, learn.pred])
    shapes = ', '.join(f'{tuple(t.shape)} {t.dtype}' for t in tensors)
    return f"in epoch {learn.epoch}, {phase} batch {learn.iter}: xb, yb, pred: {shapes}"

class TrainEvalCallback(Callback):
    """Puts the model into the right mode and place, and counts progress."""
    order, run_valid = -10, False    # after_batch counts training batches only

    def before_fit(self):
        """Start from 0; move the model, and a loss function with weights, if any."""
        self.learn.epoch, self.learn.train_iter, self.learn.pct_train = 0, 0, 0.
        self.learn.loss = torch.tensor(0.)
        for o in (self.model, self.loss_func):
            if isinstance(o, nn.Module):
                o.to(self.dls.device)

    def before_train(self):
        """Training mode, but not for frozen norm layers if `train_bn` is False."""
        self.model.train()
        for m in [] if self.train_bn else self.model.modules():
            params = [*m.parameters()]
            if isinstance(m, NORM_LAYERS) and params:
                m.train(any(p.requires_grad for p in params))
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

# 4. Metrics: numbers about a whole pass; means are exact if the last batch is smaller
# --------------------------------------------------------------------------------------
class Metric:
    """Base class: `reset` before a pass, `accumulate` after every batch, then `value`.

    name: title of its column; here the class name in snake case without 'Metric'.
    value: a number, or a tensor of one; None if there is none.
    """
    value = None
    name = property(lambda self: class2attr(self, 'Metric'))

    def __repr__(self):
        return f'{type(self).__name__}({self.name!r})'

    def reset(self):
        """Forget all batches."""

    def accumulate(self, learn):
        """Take in the batch: `learn.xb`, `learn.yb`, `learn.pred`, `learn.loss`."""

class AvgMetric(Metric):
    """Mean over all samples of `func(pred, *yb)`, which is the mean of one batch."""
    def __init__(self, func=None):
        self.func = func
        self.reset()

    def reset(self):
        """Forget all batches."""
        self.total, self.count = torch.zeros(()), 0

    def accumulate(self, learn):
        """Add the batch."""
        pred = map_tensors(without_graph, learn.pred)
        self.add(self.func(pred, *learn.yb), n_rows(learn))

    def add(self, value, bs):
        """Add the mean of `bs` samples; it stays on the device, so nothing waits."""
        self.total = self.total.add(without_graph(value), alpha=bs)
        self.count += bs

    name = property(lambda self: func_name(self.func))
    value = property(lambda self: self.total / self.count if self.count else None)

class AvgLoss(AvgMetric):
    """Mean of `learn.loss` over all samples."""
    name = 'loss'

    def accumulate(self, learn):
        """Add the loss of the batch."""
        self.add(batch_loss(learn), n_rows(learn))

class AvgSmoothLoss(Metric):
    """Debiased moving average of the training loss; `beta` (< 1) weighs the past."""
    name, count = 'smooth_loss', 0

    def __init__(self, beta=0.98):
        self.beta = beta

    def reset(self):
        """Forget all batches."""
        self.value, self.count = None, 0

    def accumulate(self, learn):
        """Mix the loss of the batch in."""
        loss = batch_loss(learn).float()
        self.count += 1
        # weights, newest first: 1, beta, beta**2, ...; share: the first over their sum
        share = (1 - self.beta) / (1 - self.beta ** self.count)
        self.value = loss.clone() if self.count == 1 else self.value.lerp(loss, share)

def mk_metric(m):
    """`m` as a `Metric`: functions are averaged; section 14 wraps objects, too."""
    m = m() if isinstance(m, type) else m
    ok = callable(m) or isinstance(m, Metric)
    check(ok, f"metric {m!r}: give a function of (pred, target)", TypeError)
    return m if isinstance(m, Metric) else AvgMetric(m)

def batch_loss(learn):
    """The loss of the batch as one number, without its graph."""
    loss = without_graph(learn.loss)
    return loss.mean() if loss.dim() else loss    # a mean costs more than the test

def without_graph(t):
    """`t`, detached from its graph if it has one; a number as it is."""
    return t.detach() if getattr(t, 'requires_grad', False) else t

def first_item(b):
    """The first item of `b`, the innermost one of nested tuples, lists and dicts."""
    while not isinstance(b, Tensor) and isinstance(b, (tuple, list, Mapping)) and b:
        b = b[0] if isinstance(b, (tuple, list)) else next(iter(b.values()))
    return b

def find_bs(b):
    """Batch size of `b`: the rows of its first item; 1 without a shape."""
    shape = getattr(first_item(b), 'shape', ())
    return shape[0] if shape else 1

def n_rows(learn):
    """Batch size, by a target that is a tensor, as others may be lists; else by xb."""
    return find_bs([y for y in tuplify(learn.yb) if isinstance(y, Tensor)] or learn.xb)

def accuracy(pred, target, axis=-1):
    """Share of the samples whose largest score along `axis` is at the target class.

    pred: (B, C) scores; target: (B,) or (B, 1) int; further dimensions alike.
    Raises: ValueError for a single score per sample, or other shapes.
    """
    found = pred.argmax(axis)
    if target.dim() > found.dim():    # or each would be compared with every other
        target = target.squeeze(-1)
    if pred.shape[axis] < 2 or found.shape != target.shape:
        raise ValueError(f"scores {tuple(pred.shape)}, targets {tuple(target.shape)}: "
                         f"give 2 or more scores along axis {axis} for each target")
    return (found == target).float().mean()

# 5. Recorder: what happened, kept and printed
# --------------------------------------------------------------------------------------
class Recorder(Callback):
    """Keeps losses, learning rates and metrics; gives the logger a row for every epoch.

    add_time: end the row with the time, 'mm:ss', from an hour on 'h:mm:ss'.
    train_metrics, valid_metrics: whether metrics are computed in that pass.
    beta: weight of the past in `learn.smooth_loss`, which is also the train_loss shown.
    losses, lrs: smoothed loss (0-d) and rate of the last group, by training batch.
    iters: training batches up to each epoch's end.
    log, metric_names: the newest row; the titles of its entries, which are not printed.
    hps: hypers that were scheduled in the fit, `{name: one value per training batch}`.
    values: all rows' numbers, None for a cancelled pass; last: `learn.final_record`.
    """
    order, hps, row = 50, {}, []
    train_mets = valid_mets = lrs = losses = iters = values = ()

    def __init__(self, add_time=True, train_metrics=False, valid_metrics=True,
                 beta=0.98):
        self.add_time, self.train_metrics = add_time, train_metrics
        self.valid_metrics, self.beta = valid_metrics, beta

    def before_fit(self):
        self.lrs, self.iters, self.losses, self.values, self.hps = [], [], [], [], {}
        self.log, self.row, self.learn.smooth_loss = [None], [], None
        metrics = [mk_metric(m) for m in listify(self.learn.metrics)]
        train = metrics if self.train_metrics else []
        valid = metrics if self.valid_metrics else []
        self.train_mets = [AvgSmoothLoss(self.beta), *train]
        self.valid_mets = [] if self.dls.valid is None else [AvgLoss(), *valid]
        prefix = 'valid_' if self.train_metrics else ''
        names = ['train_loss', *(f'train_{m.name}' for m in train)]
        if self.valid_mets:
            names += ['valid_loss', *(prefix + m.name for m in valid)]
        self.metric_names = ['epoch', *names, *(['time'] if self.add_time else [])]

    def before_epoch(self):
        self.start = time.perf_counter()
        self.row = [None] * len(self.train_mets + self.valid_mets)

    def before_train(self):
        """Reset the metrics; the smoothed loss goes on through the epochs."""
        for m in self.train_mets[1:]:
            m.reset()

    def before_validate(self):
        for m in self.valid_mets:
            m.reset()

    def after_batch(self):
        """Measure, unless the batch was cancelled or had no target."""
        learn = self.learn
        if not learn.completed or not learn.yb:
            return
        for m in self.train_mets if learn.training else self.valid_mets:
            try:
                m.accumulate(learn)
            except Exception as error:
                error.add_note(f"raised by the metric {m.name!r}")
                raise
        if learn.training and self.train_mets:
            learn.smooth_loss = self.train_mets[0].value
            self.losses.append(learn.smooth_loss)
            self.lrs.append(learn.opt.lr)

    def after_train(self):
        if self.completed:
            self.row[:len(self.train_mets)] = map(final_value, self.train_mets)
            if len(self.losses) == (self.iters or [0])[-1]:    # none since last epoch
                warnings.warn("nothing was trained: no batch with a target was done")

    def after_validate(self):
        if self.completed:
            self.row[len(self.train_mets):] = map(final_value, self.valid_mets)

    def after_epoch(self):
        """Keep and show the row, unless the whole epoch was skipped."""
        row, self.row = self.row, []    # the next epoch may be cancelled at once
        if all(value is None for value in row):
            return
        self.iters.append(len(self.losses))
        self.values.append(row)
        self.learn.final_record = row
        self.log = [self.epoch, *row]
        if self.add_time:
            took = timedelta(seconds=round(time.perf_counter() - self.start))
            self.log.append(str(took).removeprefix('0:'))
        self.logger(self.log)

def final_value(metric):
    """The value of a metric as a Python number. Raises: TypeError if it is none."""
    value = metric.value
    if hasattr(value, 'item') and {*value.shape} <= {1}:
        value = value.item()
    is_number = value is None or isinstance(value, (int, float))
    check(is_number, f"metric {metric.name!r} is {value!r}, not one number", TypeError)
    return value

defaults.callbacks.append(Recorder)

# 6. Data: loaders of batches
# --------------------------------------------------------------------------------------
class TensorLoader:
    """Cuts batches from tensors in memory, by one index_select each, not row by row.

    tensors: (N, ...) with the same N each, inputs first; on any device.
    bs: rows of a batch; the last may have fewer, or is left out by `drop_last`.
    shuffle: a new order each epoch, from torch's global generator.
    """
    def __init__(self, *tensors, bs=64, shuffle=False, drop_last=False):
        lengths = [len(t) for t in tensors]
        check(len({*lengths}) == 1, f"tensors of {lengths} rows: give as many of each")
        check(bs > 0, f"{bs=}: give the number of rows of a batch, 1 or more")
        self.dataset = data_tools.TensorDataset(*tensors)
        self.bs, self.shuffle, self.drop_last = bs, shuffle, drop_last

    def __len__(self):
        full, rest = divmod(len(self.dataset), self.bs)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self):
        make_order = torch.randperm if self.shuffle else torch.arange
        order = make_order(len(self.dataset), device=self.dataset.tensors[0].device)
        for rows in order.split(self.bs)[:len(self)]:
            yield tuple(t.index_select(0, rows) for t in self.dataset.tensors)

    def __repr__(self):
        return f'TensorLoader({len(self.dataset)} rows, bs={self.bs})'

class Keywords(dict):
    """Inputs that the model takes as keywords, since the batch was a dict."""

class DataLoaders:
    """The loaders of a training: `dls[0]` is `dls.train`, `dls[1]` is `dls.valid`.

    These are torch DataLoaders, TensorLoaders, lists of batches: whatever can be looped
    over again and again. Without `valid`, nothing is validated.
    path: folder of the project. device: where batches go; default: the best at hand.
    n_inp: how many items of a batch are inputs; default: all but the last.
    vocab: names of the classes, by number. decode: instead, a function from a decoded
      prediction to what a person reads.
    targets: key or keys of the targets in dict batches; the model gets all others.
    split: function from a batch of any kind to inputs and targets, `(xb, yb)`.
    Attributes that are missing here are looked up in `train`.
    """
    def __init__(self, train, valid=None, *others, path='.', device=None, n_inp=None,
                 vocab=None, decode=None, targets=None, split=None):
        self.train, self.valid, self.others = train, valid, others
        for dl in [train, *(dl for dl in self.loaders if dl is not None)]:
            check_loader(dl)
        self.path, self.vocab, self.decode = Path(path), vocab, decode
        self.n_inp = n_inp or getattr(self.train, 'n_inp', None)
        self.targets, self.split = listify(targets), split
        self.to(device or default_device())

    loaders = property(lambda self: [self.train, self.valid, *self.others])
    train_ds = property(lambda self: getattr(self.train, 'dataset', None))
    valid_ds = property(lambda self: getattr(self.valid, 'dataset', None))

    @classmethod
    def from_tensors(cls, x, y=None, valid=None, valid_pct=0.2, bs=64, seed=None,
                     shuffle=True, drop_last=False, device=None, **kwargs):
        """DataLoaders over tensors or arrays x, y (N, ...), moved to the device whole.

        x, y: tuples if there are several inputs or targets.
        valid: a pair like (x, y); default: rows of these, left out of the training.
        valid_pct: their share; seed: an int that decides which ones.
        shuffle, drop_last: of the training loader. kwargs: see `DataLoaders`.
        """
        check(0 <= valid_pct < 1, f"{valid_pct=}: give a share below 1")
        xs, ys = as_tensors(x), as_tensors(y)
        train = TensorLoader(*xs, *ys, bs=bs, shuffle=shuffle, drop_last=drop_last)
        held_out = [t for part in listify(valid) for t in as_tensors(part)]
        check(len(held_out) in (0, len(xs + ys)), "valid: give a pair like (x, y)")
        if valid is None and valid_pct:
            tensors, n = train.dataset.tensors, len(train.dataset)
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            order = torch.randperm(n, generator=generator).to(tensors[0].device)
            rows, others = order.tensor_split([round(n * (1 - valid_pct))])
            train.dataset.tensors = tuple(t[rows] for t in tensors)
            held_out = [t[others] for t in tensors]
        valid = TensorLoader(*held_out, bs=bs) if held_out else None
        return cls(train, valid, device=device, **{'n_inp': len(xs), **kwargs})

    def __repr__(self):
        lengths = [length_hint(dl) or '?' for dl in self.loaders if dl is not None]
        return f'DataLoaders({lengths} batches, on {self.device})'

    def __getitem__(self, i):
        return self.loaders[i]

    def __getattr__(self, k):
        # subtle: copy and pickle ask before __init__ ran, when `train` is missing, too
        if 'train' not in vars(self) or k.startswith('__'):
            raise AttributeError(k)
        return getattr(self.train, k)

    def split_batch(self, b):
        """Tuples `(xb, yb)` of a batch; of a dict, `(inputs,)` and its targets."""
        if self.split:
            return tuple(map(tuplify, self.split(b)))
        if not isinstance(b, (tuple, list)) and isinstance(b, Mapping):
            if not self.targets:
                raise TypeError(f"of {list(b)}, say: DataLoaders(..., targets=key)")
            inputs = Keywords({k: v for k, v in b.items() if k not in self.targets})
            return (inputs,), tuple(b[k] for k in self.targets if k in b)
        items = tuple(b) if isinstance(b, (tuple, list)) else (b,)
        n = self.n_inp or max(1, len(items) - 1)
        return items[:n], items[n:]

    def one_batch(self):
        """The first batch of a new pass over the training loader, on the device."""
        return to_device(next(iter(self.train)), self.device)

    def to(self, device):
        """Send batches to `device` from now on; tensors in memory move at once."""
        # 'cuda' becomes 'cuda:0', as tensors have it: to_device compares them
        self.device = torch.empty(0, device=device).device
        for dl in self.loaders:
            if isinstance(dl, TensorLoader):
                dl.dataset.tensors = to_device(dl.dataset.tensors, self.device)
        return self
    cuda, cpu = partialmethod(to, 'cuda'), partialmethod(to, 'cpu')

def check_loader(dl):
    """Refuse what holds rows, or gives its batches only once, in place of a loader."""
    ok = not isinstance(dl, (type(None), Tensor, Iterator, data_tools.Dataset))
    check(ok, f"{type(dl).__name__} is no loader: give a DataLoader", TypeError)

def as_tensors(o):
    """List of tensors from a tensor, an array, or a tuple of these; None is empty."""
    def convert(a):    # floats of an array, float64 in NumPy, to torch's default
        t = torch.as_tensor(a)
        stays = isinstance(a, Tensor) or not t.is_floating_point()
        return t if stays else t.to(torch.get_default_dtype())
    return [] if o is None else [convert(a) for a in tuplify(o)]

def map_tensors(f, b):
    """Apply `f` to all tensors in tuples, lists, dicts and dataclasses; types stay."""
    if isinstance(b, Tensor):
        return f(b)
    if isinstance(b, (tuple, list)):
        items = [map_tensors(f, o) for o in b]
        return type(b)(*items) if hasattr(b, '_fields') else type(b)(items)
    if isinstance(b, Mapping):
        new = copy.copy(b)    # a copy keeps its type
        for k, v in b.items():
            new[k] = map_tensors(f, v)
        return new
    if dataclasses.is_dataclass(b) and not isinstance(b, type):
        new = copy.copy(b)
        for field in dataclasses.fields(b):    # of `object`, as it may be frozen
            object.__setattr__(new, field.name, map_tensors(f, getattr(b, field.name)))
        return new
    return b

def tensors_in(b):
    """List of all tensors in nested tuples, lists, dicts and dataclasses."""
    found = []
    map_tensors(lambda t: found.append(t) or t, b)    # append returns None
    return found

def to_device(b, device=None, non_blocking=False):
    """Move every tensor of a batch to `device` (default: `default_device()`)."""
    device = device or default_device()
    def move(t):    # the comparison costs less than a call that finds nothing to do
        return t if t.device == device else t.to(device, non_blocking=non_blocking)
    return map_tensors(move, b)

def default_device():
    """The best device at hand: CUDA, then Apple's MPS, then the CPU."""
    mps = 'mps' if torch.backends.mps.is_available() else 'cpu'
    return torch.device('cuda' if torch.cuda.is_available() else mps)

# 7. Optimizer: a chain of small step functions makes any of them
# --------------------------------------------------------------------------------------
# A step function takes a parameter `p` (its gradient is `p.grad`) and, by keyword, the
# hypers and the state that it needs; `**kwargs` swallows the others. It changes `p` in
# place, or returns a dict with new state for `p`, or both. A Learner takes yours by
# opt_func=partial(Optimizer, cbs=[weight_decay, your_step], wd=0.01).

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
    grad_avg = p.grad.data.mul(0) if grad_avg is None else grad_avg
    return {'grad_avg': grad_avg.mul_(mom).add_(p.grad.data, alpha=1 - dampening * mom)}

def average_sqr_grad(p, sqr_mom, dampening=True, sqr_avg=None, **kwargs):
    """sqr_avg = sqr_mom * sqr_avg + (1 - sqr_mom) * grad**2; undamped: + grad**2."""
    sqr_avg = p.grad.data.mul(0) if sqr_avg is None else sqr_avg
    grad, damp = p.grad.data, 1 - dampening * sqr_mom
    return {'sqr_avg': sqr_avg.mul_(sqr_mom).addcmul_(grad, grad, value=damp)}

def momentum_step(p, lr, grad_avg, **kwargs):
    """p -= lr * grad_avg"""
    p.data.add_(grad_avg, alpha=-lr)

def step_stat(p, step=0, **kwargs):
    """Count the steps of `p`, from 1."""
    return {'step': step + 1}

def debias(mom, damp, step):
    """Sum of `step` weights, the newest `damp`, in a moving average: divide by it."""
    return damp * (1 - mom**step) / (1 - mom)

def adam_step(p, lr, mom, step, sqr_mom, grad_avg, sqr_avg, eps, **kwargs):
    """p -= lr * grad_avg / (sqrt(sqr_avg) + eps), debiased. Kingma and Ba, 2015."""
    debias1, debias2 = debias(mom, 1 - mom, step), debias(sqr_mom, 1 - sqr_mom, step)
    denom = sqr_avg.div(debias2).sqrt_().add_(eps)
    p.data.addcdiv_(grad_avg, denom, value=-lr / debias1)

class Optimizer:
    """Runs step functions, one after another, on every parameter that has a gradient.

    params: parameters (one group), or iterables of them (groups), or a single tensor.
    cbs: a step function or a list, no Callbacks; `f.defaults`, a dict, adds hypers.
    train_bn: not used here, see `Learner`. defaults: hypers of all groups.
    """
    made_for = None    # a Learner that makes it remembers the parameters here
    lr = property(lambda self: self.hypers[-1]['lr'], doc="Rate of the last group.")

    def __init__(self, params, cbs, train_bn=True, **defaults):
        self.cbs, self.param_lists = listify(cbs), as_groups(params)
        self.hypers = [{} for _ in self.param_lists]
        self.state = defaultdict(dict)
        # all_params makes a state for each parameter
        check(len(self.all_params()) == len(self.state), "a parameter is given twice")
        for f in self.cbs:
            # subtle: a partial of a step function has no `defaults`, its function has
            self.set_hypers(**getattr(getattr(f, 'func', f), 'defaults', {}))
        self.set_hypers(**defaults)

    def all_params(self, n=slice(None), with_grad=False):
        """List of `(p, group, state, hyper)` over the groups in the slice `n`."""
        return [(p, group, self.state[p], hyper)
                for group, hyper in zip(self.param_lists[n], self.hypers[n])
                for p in group if not with_grad or p.grad is not None]

    def set_hyper(self, k, v):
        """Set hyper `k` to `v`: one value for all groups, or a list with one per group.

        v may be `slice(a, b)`: a for the first group, b for the last, equal factors in
        between; or `slice(b)`: b for the last group, b / 10 for the others.
        """
        values = spread(v, len(self.param_lists), k)
        ok = all(isinstance(value, (int, float)) and value >= 0 for value in values)
        if not ok and k in ('lr', 'mom', 'sqr_mom', 'eps', 'wd'):
            raise ValueError(f"{k}={v!r}: give a number of at least 0")
        for i, value in enumerate(values):
            self._set(i, k, value)

    def _set(self, i, k, value):
        self.hypers[i][k] = value

    def __repr__(self):
        return f'{type(self).__name__}({self.hypers})'

    def set_hypers(self, **kwargs):
        """`set_hyper` for every keyword."""
        for k, v in kwargs.items():
            self.set_hyper(k, v)

    @torch.no_grad()
    def step(self):
        """Step each parameter that has a gradient; section 18 steps many at once."""
        for p, _, state, hyper in self.all_params(with_grad=True):
            for f in self.cbs:
                state.update(run_step(f, p, state, hyper))

    def zero_grad(self, set_to_none=True):
        """Forget all gradients; `set_to_none=False` fills them with 0 instead."""
        for p in [p for group in self.param_lists for p in group]:
            is_kept = not set_to_none and p.grad is not None
            p.grad = p.grad.detach_().zero_() if is_kept else None

def run_step(f, p, state, hyper):
    """What the step function `f` returns for `p`, a dict; an error says what it got."""
    kwargs = {**state, **hyper}
    try:
        return f(p, **kwargs) or {}
    except TypeError as error:
        error.add_note(f"{func_name(f)} got {sorted(kwargs)}: add what is missing")
        raise

def trainable_params(model):
    """The parameters of `model` that require a gradient: a list, hence one group."""
    return [p for p in model.parameters() if p.requires_grad]

NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

def norm_bias_params(model, with_bias=True):
    """List of the parameters of all norm layers and, if `with_bias`, all biases."""
    return [p for m in model.modules() for name, p in m.named_parameters(recurse=False)
            if isinstance(m, NORM_LAYERS) or (with_bias and 'bias' in name)]

def as_groups(params):
    """Lists of parameters from parameters, iterables of them, or a single tensor."""
    params = [params] if isinstance(params, Tensor) else list(params)
    check(dict not in map(type, params), "groups are dicts: give lists of parameters")
    is_one = [isinstance(p, Tensor) or not hasattr(p, '__iter__') for p in params]
    return [params] if any(is_one) or not params else [list(p) for p in params]

def spread(v, n, name='hyper'):
    """The `n` values that `v` stands for: for slice(1, 100) and 3, [1., 10., 100.]."""
    if isinstance(v, slice) and v.start is None:
        return [float(v.stop / 10)] * (n - 1) + [float(v.stop)]
    if isinstance(v, slice):    # back from the end, so that a single group gets it
        check(v.start > 0 and v.stop > 0, f"{name}={v}: both ends must be above 0")
        return [float(v.stop * (v.start / v.stop) ** (i / max(1, n - 1)))
                for i in reversed(range(n))]
    values = v.tolist() if hasattr(v, 'tolist') else v    # of an array or a tensor
    values = list(values) if isinstance(values, (list, tuple)) else [values] * n
    if len(values) != n:
        raise ValueError(f"{name}={v!r}: {len(values)} values for {n} parameter groups")
    return [value.item() if hasattr(value, 'item') else value for value in values]

def SGD(params, lr, mom=0., wd=0., decouple_wd=True):
    """Optimizer: gradient descent with momentum `mom` (0 to 1) and weight decay `wd`.

    Equals torch.optim.SGD if `decouple_wd=False`. With mom=0, a later `mom` is ignored.
    """
    steps = [weight_decay if decouple_wd else l2_reg]
    steps += [average_grad, momentum_step] if mom else [sgd_step]
    return Optimizer(params, steps, lr=lr, mom=mom, wd=wd)

def Adam(params, lr, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.01, decouple_wd=True):
    """Optimizer: momentum and RMSProp together, with both averages debiased.

    With equal hypers, torch.optim.AdamW (Adam if not decouple_wd); betas=mom, sqr_mom.
    """
    steps = [weight_decay if decouple_wd else l2_reg, step_stat,
             partial(average_grad, dampening=True), average_sqr_grad, adam_step]
    return Optimizer(params, steps, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

# PART II: The rest of fastai's Learner
# --------------------------------------------------------------------------------------

import atexit
import gc
import inspect
import math
import operator
import os
import random
import sys
import zipfile
from collections import ChainMap, namedtuple
from contextlib import ExitStack, nullcontext, suppress

import torch.nn.functional as F

def patch(f):
    """Decorator: makes `f(self: SomeClass, ...)` a method of that class.

    The name in the module stays with what had it before, if anything.
    """
    cls = next(iter(inspect.get_annotations(f, eval_str=True).values()))
    setattr(cls, f.__name__, f)
    return f.__globals__.get(f.__name__, f)

# 8. Shared by several sections: contexts, random numbers, processes
# --------------------------------------------------------------------------------------
# Needs: Part I only
# Callbacks with `only_fit` take part in a fit, not in get_preds, validate or lr_find
Callback.only_fit, Recorder.only_fit = False, True

def replacing_yield(o, attr, val):
    """Generator, for `contextmanager`: set `o.attr` to `val`; at the end, undo that."""
    old = getattr(o, attr)
    try:
        yield setattr(o, attr, val)
    finally:
        setattr(o, attr, old)

replacing = contextmanager(replacing_yield)

@contextmanager
def restored(learn):
    """Context after which learner, callbacks and modes of the model are as before."""
    kept, modes = dict(vars(learn)), {m: m.training for m in learn.model.modules()}
    try:
        yield
    finally:
        others, learn.__dict__ = learn.cbs, kept    # at once: Ctrl-C may come here
        for cb in others + learn.cbs:
            cb.learn = learn if cb in learn.cbs else None
        for m, mode in modes.items():
            m.training = mode

@patch
@contextmanager
def removed_cbs(self: Learner, cbs):
    """Context without `cbs` (callbacks or classes); yields the learner."""
    before, rest = self.cbs, self.remove_cbs(cbs).cbs
    try:
        yield self
    finally:
        # to their old places, since equal orders run in the order of adding
        self.cbs = [cb for cb in before if cb not in rest or cb in self.cbs] + self.cbs

@patch
def no_logging(self: Learner):
    """Context in which nothing is printed."""
    return replacing(self, 'logger', lambda *args: None)

def say(learn, text):
    """Print `text`, unless the rows go to a logger of yours, or nowhere."""
    owner = getattr(learn.logger, '__self__', None)
    if learn.logger is print or isinstance(owner, Callback):
        print(text)

def set_seed(s, reproducible=False):
    """Seed Python, NumPy (if imported) and torch, on all devices, with the int `s`.

    reproducible: ask cuDNN for deterministic kernels, which may be slower.
    """
    random.seed(s)
    torch.manual_seed(s)
    if 'numpy' in sys.modules:
        sys.modules['numpy'].random.seed(s % 2**32)
    if reproducible:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

def rng_state(dls):
    """State of all that draws random numbers, generators of torch loaders included."""
    state = {'python': random.getstate(), 'torch': torch.get_rng_state(),
             'cuda': torch.cuda.get_rng_state_all(),
             'loaders': [g.get_state() for g in generators_of(dls)]}
    if 'numpy' in sys.modules:
        kind, keys, *rest = sys.modules['numpy'].random.get_state()
        state['numpy'] = (kind, keys.tolist(), *rest)
    return state

def set_rng_state(state, dls):
    """Go back to what `rng_state` returned, for the generators that are here, too."""
    random.setstate(state['python'])
    torch.set_rng_state(state['torch'])
    torch.cuda.set_rng_state_all(state['cuda'][:torch.cuda.device_count()])
    for generator, own in zip(generators_of(dls), state['loaders']):
        generator.set_state(own)
    if 'numpy' in state and 'numpy' in sys.modules:
        sys.modules['numpy'].random.set_state(state['numpy'])

def generators_of(dls):
    """The generators that loaders, or their samplers, were given."""
    owners = [*dls.loaders]
    for name in ('sampler', 'batch_sampler', 'sampler'):    # a batch sampler's, at last
        owners += [getattr(owner, name, None) for owner in owners]
    found = dict.fromkeys(getattr(owner, 'generator', None) for owner in owners)
    return [g for g in found if isinstance(g, torch.Generator)]

def n_processes():
    """How many processes train together: the size of torch's group, or 1."""
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if in_group else 1

def process_rank():
    """Number of this process in its group, from 0; 0 if there is no group."""
    return torch.distributed.get_rank() if n_processes() > 1 else 0

def to_detach(b, cpu=True, gather=True):
    """Detach every tensor of a batch from its graph; `cpu`: and move it to the CPU.

    gather: first join the rows of all processes, which must have equally many.
    """
    def detach(t):
        t = t.detach()
        if gather and n_processes() > 1:
            parts = [torch.empty_like(t) for _ in range(n_processes())]
            torch.distributed.all_gather(parts, t.contiguous())
            t = torch.cat(parts) if t.dim() else torch.stack(parts)
        return t.cpu() if cpu else t
    return map_tensors(detach, b)

def to_detach_from_dl(learn, b, cpu=True, gather=True):
    """`to_detach` of the learner's current loader, if it has one, else the function."""
    return getattr(learn.dl, 'to_detach', to_detach)(b, cpu=cpu, gather=gather)

Learner.to_detach = to_detach_from_dl

# 9. Schedules: hyper-parameters as functions of the progress of training
# --------------------------------------------------------------------------------------
# Needs: 8; 19 to draw
def annealer(f):
    """Decorator: `f(start, end, pos)` becomes `g(start, end)`, a function of `pos`.

    start, end: numbers, or lists with one number per parameter group. pos: 0 to 1.
    """
    return lambda start, end: partial(anneal, f, start, end)

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

def sched_cos(start, end, pos):
    """Along half a cosine: slow, fast, slow."""
    return start + (1 - math.cos(math.pi * pos)) * (end - start) / 2

SchedLin, SchedNo = annealer(sched_lin), annealer(sched_no)
SchedExp, SchedCos = annealer(sched_exp), annealer(sched_cos)

def SchedPoly(start, end, power):
    """From `start` to `end` along `pos**power`."""
    return annealer(lambda a, b, pos: a + (b - a) * pos**power)(start, end)

def combine_scheds(pcts, scheds):
    """Play schedules one after another; `pcts` are their shares and sum to 1.

    Each sees `pos` from 0 to 1 of its own part; a part without a share is at its end.
    """
    ok = len(pcts) == len(scheds) and min(pcts) >= 0 and abs(sum(pcts) - 1) < 1e-6
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

    hps: what was set, a list per name, of the last group. After the fit,
      `recorder.hps` holds those of all schedulers.
    """
    order, run_valid, keeps = 60, False, ('hps',)

    def __init__(self, scheds):
        self.scheds, self.hps = scheds, {}

    def before_fit(self):
        """Refuse hypers that the optimizer does not have; `mom` may be added."""
        self.hps, known = {}, {*self.opt.hypers[-1], 'mom'}
        check(length_hint(self.dls.train), "a schedule needs len(dls.train)")
        for name in self.scheds:
            check(name in known, f"no hyper {name!r}: it has {sorted(known)}")

    def before_batch(self):
        for name, sched in self.scheds.items():
            self.opt.set_hyper(name, sched(self.pct_train))
            self.hps.setdefault(name, []).append(self.opt.hypers[-1][name])

    def after_fit(self):
        if 'recorder' in vars(self.learn):
            self.recorder.hps = {**self.recorder.hps, **self.hps}

@patch
def fit_one_cycle(self: Learner, n_epoch, lr_max=None, div=25., div_final=1e5,
                  pct_start=0.25, wd=None, moms=None, cbs=None, reset_opt=False,
                  start_epoch=0):
    """Fit while the learning rate rises, then falls, and momentum does the opposite.

    lr_max: highest rate, by group as in `Optimizer.set_hyper`; default: `self.lr`.
    div, div_final: it starts at lr_max / div and ends at lr_max / div_final.
    pct_start: share of the fit (0 to 1) up to the peak.
    moms: momentum at the start, peak and end; default: `self.moms`. An optimizer with
      `mom=0` is left without.
    Others: see `Learner.fit`. Source: Smith and Topin, 'Super-Convergence', 2018.
    """
    opt = self.ensure_opt(reset_opt)
    opt.set_hyper('lr', self.lr if lr_max is None else lr_max)
    peak = [hyper['lr'] for hyper in opt.hypers]
    start, end = [lr / div for lr in peak], [lr / div_final for lr in peak]
    scheds = {'lr': combined_cos(pct_start, start, peak, end)}
    if any(hyper.get('mom') != 0 for hyper in opt.hypers):
        scheds['mom'] = combined_cos(pct_start, *(self.moms if moms is None else moms))
    cbs = [ParamScheduler(scheds), *listify(cbs)]
    self.fit(n_epoch, peak, wd, cbs, start_epoch=start_epoch)

class LRFinder(Callback):
    """Raises the learning rate by equal factors for `num_it` batches, then stops.

    stop_div: also stop when the smoothed loss is NaN, or 4 times above its lowest.
    Source: Smith, 'Cyclical Learning Rates for Training Neural Networks', 2017.
    """
    order, run_valid = 60, False

    def __init__(self, start_lr=1e-7, end_lr=10, num_it=100, stop_div=True):
        self.sched, self.num_it = SchedExp(start_lr, end_lr), num_it
        self.stop_div = stop_div

    def before_batch(self):
        self.opt.set_hyper('lr', self.sched(self.train_iter / self.num_it))

    def after_batch(self):
        losses = self.recorder.losses
        # not `>`, which is False for NaN
        explodes = losses and not losses[-1] <= 4 * torch.stack(losses).min()
        if self.train_iter >= self.num_it or self.stop_div and explodes:
            raise CancelFitException

    def before_validate(self):
        raise CancelValidException

def minimum(lrs, losses, num_it):
    """A tenth of the rate at which the loss was lowest."""
    return lrs[losses.argmin()] / 10

def steep(lrs, losses, num_it):
    """The rate at which the loss fell most steeply; noise may put it at the begin."""
    return lrs[(losses.diff() / lrs.log().diff()).argmin()]

@patch
def lr_find(self: Learner, start_lr=1e-7, end_lr=10, num_it=100, stop_div=True,
            show_plot=True, suggest_funcs=(minimum, steep)):
    """Try out learning rates from `start_lr` to `end_lr`, on a copy of the model.

    Everything is then as before, but for the history in `recorder`: that of the search.
    Your callbacks take part and keep what they count; `only_fit = True` excludes one.
    num_it, stop_div: see `LRFinder`. show_plot: draw the losses and the suggestions.
    suggest_funcs: functions of (lrs, losses, num_it), two tensors and an int.
    Returns: the rates that these return, a named tuple of floats; None without them.
    """
    check('recorder' in vars(self), "lr_find needs the Recorder: add_cb(Recorder)")
    check(self.dl is None, "lr_find in the middle of a fit: call it before, or after")
    with restored(self), self.no_logging(), ExitStack() as at_exit:
        at_exit.callback(set_rng_state, rng_state(self.dls), self.dls)
        for cb in self.cbs:
            at_exit.callback(setattr, cb, 'run', cb.run)    # the end of a fit resets it
        # copied together, so that the optimizer has the parameters of the model's copy
        copies = copy.deepcopy((self.model, self.loss_func, self.opt))
        self.model, self.loss_func, self.opt = copies
        self.cbs = [cb for cb in self.cbs if not cb.only_fit or cb is self.recorder]
        # the finder ends it after num_it batches, and an epoch has one at least
        self.fit(num_it, cbs=LRFinder(start_lr, end_lr, num_it, stop_div))
    suggestions = suggest_lrs(self.recorder, num_it, listify(suggest_funcs))
    if show_plot:
        self.recorder.plot_lr_find(suggestions=suggestions)
    return suggestions or None

def suggest_lrs(recorder, num_it, funcs):
    """What the functions say of the losses that are numbers, a named tuple.

    If there are more than num_it // 10 + 7, without the first tenth and the last five.
    """
    lrs, losses = torch.tensor(recorder.lrs), torch.tensor(recorder.losses)
    lrs, losses = lrs[losses.isfinite()], losses[losses.isfinite()]
    if len(losses) > num_it // 10 + 7:
        lrs, losses = lrs[num_it // 10:-5], losses[num_it // 10:-5]
    check(len(losses) > 1, "fewer than two losses are finite: is there data, a target?")
    kind = namedtuple('SuggestedLRs', map(func_name, funcs), rename=True)
    return kind(*(float(f(lrs, losses, num_it)) for f in funcs))

# 10. Inference: predictions in the order of the data, which disturb nothing
# --------------------------------------------------------------------------------------
# Needs: 8
@patch
def loss_not_reduced(self: Learner):
    """Context in which the loss keeps one value per sample (`reduction='none'`)."""
    if hasattr(self.loss_func, 'reduction'):
        return replacing(self.loss_func, 'reduction', 'none')
    return replacing(self, 'loss_func', partial(self.loss_func, reduction='none'))

@patch
@contextmanager
def validation_context(self: Learner, cbs=None, inner=False):
    """Context for predictions, also in the middle of a training: nothing is disturbed.

    cbs: added for the time being; the Learner's own with `only_fit` go. Yields the
    learner, `training` False, printing nothing, its model in eval mode on `dls.device`.
    """
    with restored(self), torch.no_grad():
        self.cbs = [cb for cb in self.cbs if not cb.only_fit] + listify(cbs)
        self.logger, self.training = lambda *args: None, False
        self.model.to(self.dls.device).eval()
        yield self

def find_loader(dls, ds_idx, dl):
    """`dl`, or loader number `ds_idx` of `dls` if it is None."""
    found = dl if dl is not None else next(iter(dls.loaders[ds_idx:]), None)
    check(found is not None, f"there is no loader {ds_idx}: give ds_idx=0, or a `dl`")
    check_loader(found)
    return found

def run_validation(learn, ds_idx, dl, reorder, cbs):
    """One pass, with its events, over `dl` or loader `ds_idx`; see `get_preds`."""
    dl = find_loader(learn.dls, ds_idx, dl)
    dl = in_order(dl) if reorder else dl
    draws = isinstance(dl, data_tools.DataLoader) and dl.generator is None
    own = replacing(dl, 'generator', OWN_GENERATOR) if draws else nullcontext()
    with learn.validation_context(cbs), own:
        learn.dl = dl
        learn._stage('validate', learn.all_batches, CancelValidException)

# DataLoaders of predictions seed their workers from it, not from torch's global one
OWN_GENERATOR = torch.Generator()
# A DataLoader with one of these may draw all rows, or all `indices` of its sampler
KNOWN_SAMPLERS = (data_tools.SequentialSampler, data_tools.RandomSampler,
                  data_tools.SubsetRandomSampler, data_tools.WeightedRandomSampler)

def in_order(dl, rows=None, drop_last=False, rng=OWN_GENERATOR):
    """A loader of the rows that `dl` draws from, in order, nothing dropped.

    rows: a list of ints, to take only these of them. rng: generator of a DataLoader.
    Loaders of other kinds, or with a sampler or batches of your own, stay as they are.
    """
    if getattr(type(dl), '__iter__', None) is TensorLoader.__iter__:
        tensors = [t if rows is None else t[rows] for t in dl.dataset.tensors]
        return TensorLoader(*tensors, bs=dl.bs, drop_last=drop_last)
    plain = getattr(type(dl), '__iter__', None) is data_tools.DataLoader.__iter__
    own_batches = plain and dl.batch_size is None and dl.batch_sampler is not None
    if not plain or own_batches or not isinstance(dl.sampler, KNOWN_SAMPLERS):
        return dl
    dataset = dl.dataset
    for chosen in (getattr(dl.sampler, 'indices', None), rows):
        dataset = dataset if chosen is None else data_tools.Subset(dataset, chosen)
    names = ('batch_size num_workers collate_fn pin_memory timeout worker_init_fn '
             'multiprocessing_context')
    own = {k: getattr(dl, k) for k in names.split()}
    return data_tools.DataLoader(dataset, drop_last=drop_last, generator=rng, **own)

@patch
def validate(self: Learner, ds_idx=1, dl=None, cbs=None):
    """`[loss, *metrics]`, plain numbers, of all rows of loader `ds_idx`, or of `dl`."""
    recorder, metrics = Recorder(), [mk_metric(m) for m in listify(self.metrics)]
    # copies, as a fit may go on; but a metric may ask the model or a callback
    kept = {id(o): o for o in (self, self.model, *self.cbs, *listify(cbs))}
    recorder.valid_mets, recorder.row = [AvgLoss(), *copy.deepcopy(metrics, kept)], []
    run_validation(self, ds_idx, dl, True, [recorder, *listify(cbs)])
    return recorder.row

class GatherPredsCallback(Callback):
    """Collects inputs, predictions, targets and losses of one pass, on the CPU.

    act: function applied to predictions. save_preds, save_targs: folders to write them
    to, a file a batch, and keep none.
    """
    order = 50

    def __init__(self, act=None, with_input=False, with_loss=False, save_preds=None,
                 save_targs=None):
        self.act, self.with_input, self.with_loss = act, with_input, with_loss
        self.save_preds, self.save_targs = save_preds, save_targs

    def before_validate(self):
        self.inputs, self.preds, self.targets, self.losses = [], [], [], []

    def after_batch(self):
        if not self.completed:
            return
        pred = self.pred if self.act is None else self.act(self.pred)
        self.keep(self.preds, pred, self.save_preds)
        if self.yb:
            self.keep(self.targets, self.y, self.save_targs)
        if self.with_input:
            self.keep(self.inputs, self.x)
        if self.with_loss:
            check(self.yb, "with_loss: there is no loss without targets")
            self.keep(self.losses, self.loss.reshape(n_rows(self), -1).mean(1))

    def keep(self, kept, b, folder=None):
        """Append `b`, on the CPU, or write it to `folder`: '000_00012.pt', batch 12."""
        # a clone, as it may be a part of a large tensor, or of one that is used again
        b = map_tensors(torch.clone, self.learn.to_detach(b, gather=False))
        if folder is None:
            kept.append(b)
        elif process_rank() == 0 or 'distributed' in vars(self.learn):
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save(b, Path(folder, f'{process_rank():03}_{self.learn.iter:05}.pt'))

def concat(parts, dim=0):
    """Join tensors or arrays, or structures that are nested alike, along `dim`."""
    if not parts or parts[0] is None:
        return None
    first, kind = parts[0], type(parts[0])
    if isinstance(first, Mapping):
        return Keywords({k: concat([part[k] for part in parts], dim) for k in first})
    if isinstance(first, (tuple, list)) and tensors_in(first):
        joined = [concat(items, dim) for items in zip(*parts, strict=True)]
        return kind(*joined) if hasattr(kind, '_fields') else kind(joined)
    if isinstance(first, (tuple, list)):
        return sum(parts, kind())    # rows of another type, such as texts
    return torch.cat([*map(torch.as_tensor, parts)], dim)

def act_and_decodes(loss_func):
    """Functions from model output to prediction, and from prediction to decision.

    The loss function's own `activation` and `decodes`; else softmax and largest class
    for cross-entropy, over dimension 1; sigmoid and above 0.5 for binary cross-entropy
    with logits; else no change. Also through a `partial`; for each output of a tuple.
    """
    f, bce = getattr(loss_func, 'func', loss_func), F.binary_cross_entropy_with_logits
    act = decodes = lambda t: t
    if isinstance(f, nn.CrossEntropyLoss) or f is F.cross_entropy:
        act, decodes = lambda t: t.softmax(1), lambda t: t.argmax(1)
    if isinstance(f, nn.BCEWithLogitsLoss) or f is bce:
        act, decodes = torch.sigmoid, lambda t: t > 0.5
    act, decodes = partial(map_tensors, act), partial(map_tensors, decodes)
    return getattr(loss_func, 'activation', act), getattr(loss_func, 'decodes', decodes)

@patch
def get_preds(self: Learner, ds_idx=1, dl=None, with_input=False, with_decoded=False,
              with_loss=False, act=None, inner=False, reorder=True, cbs=None,
              save_preds=None, save_targs=None, concat_dim=0):
    """Predictions and targets of all rows of loader number `ds_idx`, or of `dl`.

    with_input, with_decoded, with_loss: return these as well; losses are (N,).
    act: function applied to predictions; default: as the loss wants it, say softmax.
    inner: accepted as in fastai; predicting in the middle of a training always works.
    reorder: all rows in the order of the data set, though the loader shuffles, weighs
      or drops some; a sampler of your own keeps its rows and order. False takes the
      batches of the loader as they come.
    save_preds, save_targs: folders to save to, a file per batch; then None is in their
      place. concat_dim: the batch dimension.
    Returns: ([inputs,] preds, targets[, decoded][, losses]); tensors on the CPU.
    """
    own_act, decodes = act_and_decodes(self.loss_func)
    gather = GatherPredsCallback(act or own_act, with_input, with_loss, save_preds,
                                 save_targs)
    with self.loss_not_reduced() if with_loss else nullcontext():
        run_validation(self, ds_idx, dl, reorder, [gather, *listify(cbs)])
    preds = concat(gather.preds, concat_dim)
    result = [concat(gather.inputs, concat_dim)] if with_input else []
    result += [preds, concat(gather.targets, concat_dim)]
    result += [decodes(preds)] if with_decoded else []
    return (*result, *([concat(gather.losses)] if with_loss else []))

@patch
def decoded(self: DataLoaders, y):
    """What a person reads for one target or decoded prediction `y`."""
    if self.decode:
        return self.decode(y)
    y = y.item() if getattr(y, 'ndim', 1) == 0 else y
    return self.vocab[y] if self.vocab is not None and isinstance(y, int) else y

@patch
def predict(self: Learner, item, with_input=False):
    """Prediction for one `item`, without batch dimension: a tensor, array, tuple, dict.

    Returns: ([input,] what a person reads, by `vocab` or `decode` of the DataLoaders;
    the decoded prediction; the prediction).
    Raises: ValueError for a batch, if the training data are tensors in memory.
    """
    if isinstance(item, Mapping):
        item = {k: v for k, v in item.items() if k not in self.dls.targets}
        inputs = (Keywords(zip(item, as_tensors((*item.values(),)))),)
    else:
        inputs = tuple(as_tensors(item))
        check_item(self.dls, inputs[0])
    batch = map_tensors(lambda t: t[None], inputs)
    with replacing(self.dls, 'split', lambda b: (b, ())):    # all of it is input
        pred, _, decoded = self.get_preds(dl=[batch], with_decoded=True)
    pred, decoded = (map_tensors(lambda t: t[0], o) for o in (pred, decoded))
    result = (self.dls.decoded(decoded), decoded, pred)
    return (detuplify(inputs), *result) if with_input else result

def check_item(dls, x):
    """Refuse a batch `x` where one item is expected, if the data tell its shape."""
    if isinstance(dls.train, TensorLoader) and not dls.split:
        shape = dls.train_ds.tensors[0].shape[1:]
        check(len(shape) == x.dim(), f"an item of shape {list(x.shape)}, but rows have "
              f"{list(shape)}; for a batch, use get_preds(dl=[batch])")

@patch
def tta(self: Learner, ds_idx=1, dl=None, n=4, item_tfms=None, batch_tfms=None,
        beta=0.25):
    """Test time augmentation: the mean of `n` augmented passes, mixed with a plain one.

    item_tfms, batch_tfms: functions that augment an input, or a batch of them (of the
      first, if there are several); without these it is up to the data set.
    beta: weight of the plain predictions; None returns `(augmented, plain)` alone.
    Returns: (preds, targets).
    """
    def augment(self):
        x, *others = self.xb
        if item_tfms is not None:
            x = torch.stack([item_tfms(item) for item in x])
        self.learn.xb = (x if batch_tfms is None else batch_tfms(x), *others)
    cb = Callback(before_batch=augment)
    passes = [self.get_preds(ds_idx, dl, cbs=cb)[0] for _ in range(n)]
    augmented = torch.stack(passes).mean(0)
    plain, targets = self.get_preds(ds_idx, dl)
    if beta is None:
        return augmented, plain
    return augmented.lerp(plain, beta), targets

# 11. Saving: files that open with stock torch.load, and never run code
# --------------------------------------------------------------------------------------
# Needs: 8
@patch
def state_dict(self: Optimizer):
    """`{'state': [a dict per parameter], 'hypers': [one per group]}`, no copies."""
    states = [state for _, _, state, _ in self.all_params()]
    return {'state': states, 'hypers': self.hypers}

@patch
def load_state_dict(self: Optimizer, sd):
    """Take over copies of what `state_dict` gave, on the devices of the parameters.

    Raises: ValueError, before any change, for the state of another optimizer.
    """
    check_fits(self, sd.get('hypers', []), sd.get('state', []))
    self.state.update({p: map_tensors(lambda t: t.to(p.device, copy=True), state)
                       for (p, *_), state in zip(self.all_params(), sd['state'])})
    self.hypers = [dict(hyper) for hyper in sd['hypers']]

def check_fits(opt, hypers, states):
    """Refuse hypers and states, one per group and parameter, of another optimizer.

    A tensor of a state may be smaller than its parameter, as one number per row.
    """
    params = [p for p, *_ in opt.all_params()]
    ok = (len(hypers), len(states)) == (len(opt.hypers), len(params))
    for own, hyper in zip(opt.hypers, hypers):
        # a fit may add others, and torch's flags change by version
        ok = ok and (own.keys() ^ hyper.keys()).isdisjoint({'lr', 'sqr_mom', 'eps'})
    for p, state in zip(params, states):
        for shape in [t.shape for t in state.values() if isinstance(t, Tensor)]:
            sizes = zip(reversed(shape), reversed(p.shape))
            ok = ok and len(shape) <= p.dim() and all(n in (1, m) for n, m in sizes)
    check(ok, "the state of another optimizer; to leave it out, say with_opt=False")

def bare_state(model):
    """State dict of `model` under the keys that it has if no part of it is wrapped."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel) or hasattr(model, '_orig_mod'):
        model = model.module if isinstance(model, parallel) else model._orig_mod
    return {k.replace('_orig_mod.', ''): v for k, v in model.state_dict().items()}

def save_model(file, model, opt, with_opt=True, pickle_protocol=2):
    """Write the state dict of `model` and, if given and `with_opt`, that of `opt`.

    file: a path, whose missing folders are made, or an open file; returned. With an
    optimizer it holds `{'model': ..., 'opt': ...}`, else the bare state dict.
    """
    state = bare_state(model)
    if with_opt and opt is not None:
        state = {'model': state, 'opt': opt.state_dict()}
    save_state(state, file, pickle_protocol)
    return file

def save_state(state, file, pickle_protocol=2):
    """`torch.save` to an open file, or to a path in one go: a crash leaves the old."""
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

    weights_only: only tensors and plain containers; no code of the file is run.
    Raises: OSError; ValueError, naming the file, for a damaged or foreign one.
    """
    with nullcontext(file) if hasattr(file, 'read') else open(file, 'rb') as f:
        try:
            start, broken = f.tell(), zipfile.ZipFile(f).testzip()
            check(broken is None, f"wrong checksum in {broken}")
            f.seek(start)
            return torch.load(f, map_location=device, weights_only=weights_only)
        except Exception as e:
            name = getattr(f, 'name', file)
            raise ValueError(f"cannot load {name} (is it torch.save's?): {e!r}") from e

def load_model(file, model, opt, with_opt=None, device=None, strict=True):
    """Load what `save_model` wrote into `model` and `opt`, wherever these live.

    file: a path or an open file; no code in it is run.
    with_opt: whether to load the optimizer; None: if it is in the file.
    device: where the file is read to on the way; default: the CPU.
    strict: the file must have all keys of the model, and no others; False loads what
      fits by name and shape, and warns of what it leaves out. So it does with an
      optimizer, unless `with_opt` demands it.
    Raises: OSError; ValueError, naming the file and the keys, if it is damaged or does
    not fit. Then nothing has changed.
    """
    put_state(file, load_state(file, device or 'cpu'), model, opt, with_opt, strict)

def put_state(file, state, model, opt, with_opt=None, strict=True):
    """Load `state`, read from `file`, into `model` and `opt`; see `load_model`."""
    both = isinstance(state, dict) and state.keys() >= {'model', 'opt'}
    weights, opt_state = (state['model'], state['opt']) if both else (state, None)
    check(isinstance(weights, dict), f"{file} holds no state dict of a model")
    own = bare_state(model)
    weights = {str(k).replace('_orig_mod.', ''): v for k, v in weights.items()}
    fit = {k: v for k, v in weights.items() if k in own and kind(v) == kind(own[k])}
    misfits = {'missing': own.keys() - weights, 'too many': weights.keys() - own,
               'of another shape': own.keys() & weights.keys() - fit.keys()}
    text = '; '.join(f'{k}: {sorted(keys)}' for k, keys in misfits.items() if keys)
    check(not strict or not text, f"{file} does not fit the model, {text}")
    check(not with_opt or opt_state, f"with_opt=True, but {file} has no optimizer")
    if opt is not None and opt_state and with_opt is not False:
        try:
            opt.load_state_dict(opt_state)
        except Exception as e:
            check(not (strict or with_opt), f"{file}: its optimizer does not fit, {e}")
            warnings.warn(f"not loaded from {file}: the optimizer, {e}")
    if text:
        warnings.warn(f"not loaded from {file}: {text}")
    names = dict(zip(own, model.state_dict()))    # with the marks of its wrappers
    model.load_state_dict({names[k]: v for k, v in fit.items()}, strict=False)

def kind(v):
    """What has to be equal for a value of a state dict to replace another."""
    return [getattr(v, name, type(v)) for name in ('shape', 'layout', 'is_meta')]

@patch
def model_file(self: Learner, file):
    """path/model_dir/file.pth; an absolute path, or an open file, as it is."""
    if not isinstance(file, (str, Path)) or Path(file).is_absolute():
        return file
    return self.path / self.model_dir / f"{str(file).removesuffix('.pth')}.pth"

@patch
def save(self: Learner, file, with_opt=True, pickle_protocol=2):
    """Save to `model_file(file)`, which is returned; see `save_model`."""
    file = self.model_file(file)
    return save_model(file, self.model, self.opt, with_opt, pickle_protocol)

@patch
def load(self: Learner, file, with_opt=None, device=None, strict=True):
    """Load from `model_file(file)`; returns the learner; see `load_model`."""
    opt = None if with_opt is False else self.ensure_opt()
    if n_processes() > 1:
        torch.distributed.barrier()    # wait for the one that may be writing it
    load_model(self.model_file(file), self.model, opt, with_opt, device, strict)
    return self

@patch
def export(self: Learner, fname='export.pkl', pickle_protocol=2):
    """Write the learner without loaders, optimizer and logger; returns path/fname.

    For `load_learner`. Of functions and classes only the names are saved: where it is
    loaded, these must be there to import.
    Raises: PicklingError or AttributeError for what has no such name, as a lambda.
    """
    file = self.path / fname
    with restored(self):
        self.dls, self.opt, self.logger = copy.copy(self.dls), None, print
        vars(self.dls).update(train=[], valid=None, others=())
        self._forget_batch()
        self.cbs = [cb for cb in self.cbs if cb.name != 'distributed']
        save_state(self, file, pickle_protocol)
    return file

def load_learner(fname, cpu=True):
    """Loading runs code of the file: open only what you trust. The Learner of `export`.

    fname: path or open file. cpu: on the CPU; else on the device that it was on.
    """
    learn = load_state(fname, 'cpu' if cpu else None, weights_only=False)
    check(isinstance(learn, Learner), f"{fname} holds a {type(learn).__name__}")
    if cpu:
        learn.dls.cpu()
    return learn

# 12. Transfer: train the last layers first
# --------------------------------------------------------------------------------------
# Needs: 8, 9
Optimizer.frozen_idx = 0    # the first group that trains

@patch
def freeze_to(self: Optimizer, n):
    """Train only the groups from `n` on (negative: counted from the end).

    Those whose state has `force_train` always train; frozen ones lose their gradient.
    Warns if all are frozen. Raises: ValueError for a negative n and a single group.
    """
    n_groups = len(self.param_lists)
    check(n >= 0 or n_groups > 1, "freezing needs 2 or more groups: give a splitter")
    self.frozen_idx = max(0, n if n >= 0 else n_groups + n)
    if self.frozen_idx >= n_groups:
        warnings.warn(f"freeze_to({n}) freezes all {n_groups} parameter group(s)")
    for i, group in enumerate(self.param_lists):
        for p in group:
            p.requires_grad_(i >= self.frozen_idx or 'force_train' in self.state[p])
            if not p.requires_grad:
                p.grad = None    # or one more step would move it

@patch
def clear_state(self: Optimizer):
    """Forget all state but the marks `force_train` and `do_wd`."""
    for p, _, state, _ in self.all_params():
        self.state[p] = {k: state[k] for k in state if k in ('force_train', 'do_wd')}

@patch
def freeze_to(self: Learner, n):
    """`Optimizer.freeze_to`; and the optimizer forgets what it has averaged."""
    opt = self.ensure_opt()
    for p in norm_bias_params(self.model, with_bias=False) if self.train_bn else []:
        opt.state[p]['force_train'] = True
    opt.freeze_to(n)
    opt.clear_state()

def freeze(self):
    """Train only the last parameter group. Raises: ValueError if it is the only one."""
    self.freeze_to(-1)

def unfreeze(self):
    """Train all parameter groups."""
    self.freeze_to(0)

Learner.freeze = Optimizer.freeze = freeze
Learner.unfreeze = Optimizer.unfreeze = unfreeze

@patch
def fine_tune(self: Learner, epochs, base_lr=2e-3, freeze_epochs=1, lr_mult=100,
              pct_start=0.3, div=5.0, **kwargs):
    """Train the last group for `freeze_epochs` epochs, then all groups for `epochs`.

    base_lr: highest rate of the first part; in the second, half of it for the last
      group, and a `lr_mult`-th of that for the first one.
    pct_start (first: 0.99), div: of the second part, see `fit_one_cycle`; kwargs: both.
    """
    self.ensure_opt(kwargs.pop('reset_opt', False))
    self.freeze()
    self.fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=0.99, **kwargs)
    self.unfreeze()
    lrs = slice(base_lr / 2 / lr_mult, base_lr / 2)
    self.fit_one_cycle(epochs, lrs, pct_start=pct_start, div=div, **kwargs)

# 13. More optimizers: RMSProp, and torch's, by opt_func=torch.optim.AdamW
# --------------------------------------------------------------------------------------
# Needs: Part I only
def rms_prop_step(p, lr, sqr_avg, eps, grad_avg=None, **kwargs):
    """p -= lr * (grad_avg or grad) / (sqrt(sqr_avg) + eps). Source: Hinton, 2012."""
    direction = p.grad.data if grad_avg is None else grad_avg
    p.data.addcdiv_(direction, sqr_avg.sqrt().add_(eps), value=-lr)

def RMSProp(params, lr, sqr_mom=0.99, mom=0., wd=0., decouple_wd=True, eps=1e-8):
    """Optimizer: divides each weight's step by the recent size of its gradients.

    Equals torch.optim.RMSprop, but for momentum, where torch averages what it divided.
    """
    steps = [weight_decay if decouple_wd else l2_reg]
    steps += [average_grad] if mom else []
    steps += [average_sqr_grad, rms_prop_step]
    return Optimizer(params, steps, lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)

def param_groups(opt):
    """`[{'params': [...], 'lr': ...}, ...]` as in torch; writes reach `hypers`."""
    return [ChainMap(h, {'params': g}) for h, g in zip(opt.hypers, opt.param_lists)]

def set_param_groups(opt, groups):
    """Take over parameters and hypers from such a list."""
    opt.param_lists = [group['params'] for group in groups]
    opt.hypers = [{k: group[k] for k in group if k != 'params'} for group in groups]

Optimizer.param_groups = property(param_groups, set_param_groups)

class OptimWrapper(Optimizer):
    """A torch optimizer with the interface of `Optimizer`: schedules, freezing, saving.

    params: as in `Optimizer`, or torch's dict groups, or (alone) a torch optimizer.
    opt: a torch optimizer, its class, or a `partial` of that; kwargs go to the class.
    hp_map: torch's names of hypers to ours; others keep their names. Its `betas` are
      our mom and sqr_mom in any case.
    convert_groups: bring lists of groups into torch's form.
    hypers: copies; `set_hyper` reaches the torch optimizer.
    """
    betas = ('mom', 'sqr_mom')
    hp_map = {'momentum': 'mom', 'weight_decay': 'wd', 'alpha': 'sqr_mom'}

    def __init__(self, params=None, opt=None, hp_map=None, convert_groups=True,
                 **kwargs):
        opt, params = (params, None) if opt is None else (opt, params)
        if not isinstance(opt, torch.optim.Optimizer):
            params = [params] if isinstance(params, Tensor) else list(params)
            if convert_groups and not any(isinstance(p, dict) for p in params):
                params = [{'params': group} for group in as_groups(params)]
            opt = opt(params, **kwargs)
        self.opt, self.state = opt, defaultdict(dict)
        self.hp_map = hp_map or self.hp_map

    step = property(lambda self: self.opt.step)
    state_dict = property(lambda self: self.opt.state_dict)
    param_groups = property(lambda self: self.opt.param_groups)
    param_lists = property(lambda self: [g['params'] for g in self.param_groups])
    hypers = property(lambda self: [*map(self._named, self.param_groups)])
    lr = property(lambda self: self.param_groups[-1]['lr'])    # as `hypers` costs more

    def _named(self, group):
        """The hypers of a torch group under our names."""
        named = {self.hp_map.get(k, k): v for k, v in group.items() if k != 'params'}
        betas = named.pop('betas', ())
        return {**named, **dict(zip(self.betas, betas))}

    def _set(self, i, k, value):
        group = self.param_groups[i]
        if k in self.betas and 'betas' in group:
            betas = list(group['betas'])
            betas[self.betas.index(k)] = value
            group['betas'] = tuple(betas)
        else:
            names = {ours: name for name, ours in self.hp_map.items() if name in group}
            group[names.get(k, k)] = value

    def clear_state(self):
        """Forget what the torch optimizer remembers."""
        self.opt.state.clear()

    def load_state_dict(self, sd):
        """Load what `state_dict` gave. Raises: ValueError if it does not fit."""
        groups = [*map(self._named, sd.get('param_groups', []))]
        states, n_params = sd.get('state', {}), len(self.all_params())
        check_fits(self, groups, [states.get(i, {}) for i in range(n_params)])
        self.opt.load_state_dict(sd)

@patch
def new_opt(self: Learner, params, lr):
    """What `opt_func` makes; if that is an optimizer of torch's, it is wrapped."""
    f = getattr(self.opt_func, 'func', self.opt_func)
    if isinstance(f, type) and issubclass(f, torch.optim.Optimizer):
        return OptimWrapper(params, self.opt_func, lr=defaults.lr)    # set later
    return self.opt_func(params, lr=lr)

def set_opt(learn, opt):
    """Set `learn.opt`: torch's are wrapped; the rates of your own become `learn.lr`."""
    is_torchs = isinstance(opt, torch.optim.Optimizer)
    vars(learn)['_opt'] = opt = OptimWrapper(opt) if is_torchs else opt
    if opt is not None and opt.made_for is None:
        learn.lr = [hyper.get('lr', defaults.lr) for hyper in opt.hypers]

Learner.opt = property(lambda self: vars(self).get('_opt'), set_opt)

# 14. A shelf of loaders, metrics and callbacks: take what you need
# --------------------------------------------------------------------------------------
# Needs: 8; 11 to save
def from_dsets(cls, train_ds, valid_ds=None, bs=64, shuffle=True, **kwargs):
    """DataLoaders over data sets.

    kwargs: path, vocab and the like are those of `DataLoaders`. All others go to
      torch's DataLoader; sampler and drop_last to that of the training alone.
    """
    own = {k: kwargs.pop(k) for k in inspect.signature(cls).parameters if k in kwargs}
    can_shuffle = not isinstance(train_ds, data_tools.IterableDataset)
    shuffle = shuffle and can_shuffle and kwargs.get('sampler') is None
    loaders = [data_tools.DataLoader(train_ds, bs, shuffle, **kwargs)]
    if valid_ds is not None:
        kwargs.update(drop_last=False, sampler=None)
        loaders.append(data_tools.DataLoader(valid_ds, bs, **kwargs))
    return cls(*loaders, **own)

DataLoaders.from_dsets = classmethod(from_dsets)

def before_batch_cb(f):
    """Decorator: a callback that replaces each batch by `f(self, xb, yb) -> xb, yb`.

    xb, yb: the tuples of the batch, without the tuple if it has one element.
    """
    def before_batch(self):
        self.learn.xb, self.learn.yb = map(tuplify, f(self, self.x, self.y))
    return Callback(before_batch=before_batch)

def error_rate(pred, target, axis=-1):
    """1 - accuracy"""
    return 1 - accuracy(pred, target, axis)

class ValueMetric(Metric):
    """A number from elsewhere: what `func()` returns at the end of a pass."""
    name = None

    def __init__(self, func, metric_name=None):
        self.func, self.name = func, metric_name or func_name(func)

    value = property(lambda self: self.func())

class ObjectMetric(Metric):
    """An object with update(pred, *yb), compute() and reset(), as in torchmetrics."""
    def __init__(self, metric):
        self.metric, self.reset = metric, metric.reset

    def accumulate(self, learn):
        """Update the object, on the device of the batch."""
        if hasattr(self.metric, 'to'):
            self.metric.to(learn.dls.device)
        self.metric.update(map_tensors(without_graph, learn.pred), *learn.yb)

    value = property(lambda self: self.metric.compute())
    name = property(lambda self: class2attr(self.metric, 'Metric'))

mk_simple_metric = mk_metric

def mk_metric(m):
    """`m` as a `Metric`: a class is called, an object wrapped, a function averaged."""
    m = m() if isinstance(m, type) else m
    wrap = {'update', 'compute', 'reset'} <= {*dir(m)} and not isinstance(m, Metric)
    return ObjectMetric(m) if wrap else mk_simple_metric(m)

class TerminateOnNaNCallback(Callback):
    """Ends the training before a NaN or infinite training loss reaches the weights.

    It reads the loss of every batch, which waits for the device. NaN inputs, however,
    have reached the averages of batch norm by then.
    """
    order = -9

    def after_loss(self):
        # of all processes, as they have to stop together
        if self.training and not to_detach(self.loss, cpu=False).isfinite().all():
            say(self.learn, f"stopped: the loss is {float(self.loss.detach().mean())}")
            raise CancelFitException

class TrackerCallback(Callback):
    """Watches a column of the Recorder: after each epoch `new_best` says if it is best.

    monitor: title of the column. min_delta: by how much it has to be better.
    comp: `comp(a, b)` is True if a is better than b; default: less for titles with loss
      or error, else greater. reset_on_fit: forget the best when a fit begins.
    best: the best value so far; infinite if there was none.
    """
    order, only_fit, keeps = 60, True, ('best', 'best_row')

    def __init__(self, monitor='valid_loss', comp=None, min_delta=0.,
                 reset_on_fit=True):
        less = 'loss' in monitor or 'error' in monitor
        self.comp = comp or (operator.lt if less else operator.gt)
        self.monitor, self.reset_on_fit = monitor, reset_on_fit
        sign = 1 if self.comp(0, 1) else -1    # of what makes a value worse
        self.min_delta, self.margin = min_delta, sign * min_delta
        self.best = self.worst = sign * math.inf

    def before_fit(self):
        check('recorder' in vars(self.learn), f"{self!r} needs the Recorder: add it")
        names = [k for k in self.recorder.metric_names if k not in ('epoch', 'time')]
        check(self.monitor in names, f"monitor={self.monitor!r}: there are {names}")
        self.new_best, self.best_row = False, 0
        if self.reset_on_fit:
            self.best = self.worst

    def after_epoch(self):
        """Compare the newest row; after a skipped epoch it is an old one, no better."""
        row = dict(zip(self.recorder.metric_names, self.recorder.log))
        value = row.get(self.monitor)
        self.new_best = value is not None and self.comp(value + self.margin, self.best)
        if self.new_best:
            self.best, self.best_row = value, len(self.recorder.values)

class EarlyStoppingCallback(TrackerCallback):
    """Ends the training after `patience` epochs in a row without a new best value.

    Others: see `TrackerCallback`.
    """
    order = 61

    def __init__(self, monitor='valid_loss', comp=None, min_delta=0., patience=1,
                 reset_on_fit=True):
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        check(patience >= 1, f"patience={patience!r}: give 1 epoch or more")
        self.patience = patience

    def after_epoch(self):
        super().after_epoch()
        wait = len(self.recorder.values) - self.best_row
        if wait >= self.patience:
            since = max(0, self.epoch - wait)    # 0 also if there was none at all
            say(self.learn, f"no improvement of {self.monitor} since epoch {since}")
            raise CancelFitException

class SaveModelCallback(TrackerCallback):
    """Saves the model whenever it is best, and loads the best at the end of the fit.

    fname: see `Learner.save`; trainings at the same time need different ones.
    every_epoch: instead, save all epochs as fname_0, fname_1, ...; an int n: those that
      n divides.
    at_end: save at the end of the fit, instead of loading.
    with_opt: the optimizer as well. Others: see `TrackerCallback`.
    """
    def __init__(self, monitor='valid_loss', comp=None, min_delta=0., fname='model',
                 every_epoch=False, at_end=False, with_opt=False, reset_on_fit=True):
        super().__init__(monitor, comp, min_delta, reset_on_fit)
        self.fname, self.every_epoch = fname, every_epoch
        self.at_end, self.with_opt = at_end, with_opt

    def after_epoch(self):
        super().after_epoch()
        if self.every_epoch:
            if self.completed and self.epoch % self.every_epoch == 0:
                self.learn.save(f'{self.fname}_{self.epoch}', self.with_opt)
        elif self.new_best:
            self.learn.save(self.fname, self.with_opt)

    def after_fit(self):
        is_saved = self.best != self.worst and not self.every_epoch
        if self.at_end and not self.failed:
            self.learn.save(self.fname, self.with_opt)
        elif is_saved and not self.failed and self.start_epoch < self.n_epoch:
            self.learn.load(self.fname)
            say(self.learn, f"loaded the best weights: {self.monitor} {self.best:.6f}")

class GradientClip(Callback):
    """Scales all gradients down together if their norm exceeds `max_norm`."""
    def __init__(self, max_norm=1., norm_type=2.):
        self.max_norm, self.norm_type = max_norm, norm_type

    def before_step(self):
        params = [p for p, *_ in self.opt.all_params(with_grad=True)]
        nn.utils.clip_grad_norm_(params, self.max_norm, self.norm_type)

class GradientAccumulation(Callback):
    """Steps once every `n_acc` samples, as if they had come in one batch.

    The last batch of an epoch steps with what there is. For losses that are means.
    """
    order, run_valid = -5, False

    def __init__(self, n_acc=32):
        self.n_acc = n_acc

    def before_train(self):
        self.count, self.sums = 0, {}

    def before_backward(self):
        self.learn.loss_grad = self.loss_grad * n_rows(self)    # sums add up

    def before_step(self):
        """Add the gradients to the sums; step with their means if there are enough."""
        params = [p for p, *_ in self.opt.all_params(with_grad=True)]
        self.count += n_rows(self) if params else 0
        for p in params:
            self.sums[p] = p.grad.add_(self.sums.get(p, 0))
        if self.count * n_processes() < self.n_acc and self.iter + 1 != self.n_iter:
            raise CancelStepException
        for p, total in self.sums.items():
            p.grad = total / self.count
        self.before_train()    # begin anew

    def after_train(self):
        """Step with what is left, as a loader without length hides the last batch."""
        if self.completed and self.count:
            self.learn.n_iter = self.iter + 1
            self.learn._stage('step', self.opt.step, CancelStepException)
            self.learn.completed = True
            self.opt.zero_grad()

class ModelResetter(Callback):
    """Calls `model.reset()` before each pass, as recurrent models need it."""
    def before_train(self):
        self.model.reset()

    before_validate = before_train

class RNNRegularizer(Callback):
    """Adds to the training loss: alpha on activations, beta on changes over time.

    For models that return (output, raw activations, activations, ...), these two being
    lists of tensors (B, time, C), one for each layer; the last layer counts.
    Source: Merity and others, 'Revisiting Activation Regularization', 2017.
    """
    def __init__(self, alpha=0., beta=0.):
        self.alpha, self.beta = alpha, beta

    def after_pred(self):
        self.learn.pred, self.raw_out, self.out = self.pred[:3]

    def after_loss(self):
        if self.training:
            out, change = self.out[-1].float(), self.raw_out[-1].float().diff(dim=1)
            # a mean, but 0 for a single time step, which has no change
            change = change.pow(2).sum() / max(1, change.numel())
            penalty = self.alpha * out.pow(2).mean() + self.beta * change
            self.learn.loss = self.loss + penalty
        self.raw_out = self.out = None    # they hold the graph

# 15. Mixed precision: half the bits where these are enough
# --------------------------------------------------------------------------------------
# Needs: 8, 13
HALF = {'fp16': torch.float16, 'bf16': torch.bfloat16}
FP16_DEVICES = {'cuda'}

Learner.autocast = None    # the context that is entered, while one is

class MixedPrecision(Callback):
    """Predicts and computes the loss in half precision; weights stay float32.

    amp_mode: 'fp16' or 'bf16'. float16 needs CUDA, elsewhere it is bfloat16. Its small
      range needs a scaler, a new one in each fit: it multiplies the loss, divides the
      gradients, and skips a step with gradients that are not finite, which waits for
      the device.
    Source: Micikevicius and others, 'Mixed Precision Training', 2018.
    """
    order, scaler = -4, None    # after accumulating, before clipping, it unscales

    def __init__(self, amp_mode='fp16'):
        check(amp_mode in HALF, f"amp_mode={amp_mode!r}: 'fp16' or 'bf16'")
        self.amp_mode = amp_mode

    def before_fit(self):
        device, self.scaler = self.dls.device.type, None
        if self.amp_mode == 'fp16' and device in FP16_DEVICES:
            self.scaler = torch.amp.GradScaler(device)
        elif self.amp_mode == 'fp16':
            warnings.warn(f"no training in float16 on {device}: bfloat16 instead")
            self.amp_mode = 'bf16'

    def before_batch(self):
        # kept on the learner: predictions in the middle of a batch put it back
        half = torch.float16 if self.scaler else torch.bfloat16
        self.learn.autocast = torch.autocast(self.dls.device.type, half)
        self.learn.autocast.__enter__()

    def after_pred(self):
        self.learn.pred = map_tensors(
            lambda t: t.float() if t.dtype in HALF.values() else t, self.pred)

    def after_loss(self):
        if self.learn.autocast:
            self.learn.autocast.__exit__(None, None, None)
        self.learn.autocast = None

    # if the batch ended before its loss, or even before this callback's after_batch
    after_batch = after_train = after_epoch = after_fit = after_loss

    def before_backward(self):
        if self.scaler:
            self.learn.loss_grad = self.scaler.scale(self.loss_grad)

    def before_step(self):
        if self.scaler and self.opt.all_params(with_grad=True):
            scale = self.scaler.get_scale()
            self.scaler.unscale_(self.opt)
            self.scaler.update()
            if scale == 0 or self.scaler.get_scale() < scale:    # not finite
                raise CancelStepException

@patch
def to_fp16(self: Learner):
    """Train in float16 where it can be done (CUDA); see `MixedPrecision`."""
    return self.to_fp32().add_cb(MixedPrecision('fp16'))

@patch
def to_bf16(self: Learner):
    """Train in bfloat16; see `MixedPrecision`."""
    return self.to_fp32().add_cb(MixedPrecision('bf16'))

@patch
def to_fp32(self: Learner):
    """Train in full precision again."""
    return self.remove_cb(MixedPrecision)

# 16. Checkpoints: a training that was killed goes on
# --------------------------------------------------------------------------------------
# Needs: 8, 11, 12
class CheckpointCallback(Callback):
    """Saves a fit after its epochs; if the file is there, the fit goes on from it.

    fname: see `Learner.save`; `Learner.load` reads the weights of such a file, too.
    every: save after each `every`-th epoch, and at the end of the fit.
    resume: False begins anew, and replaces the file.
    Kept are model, loss function, optimizer, random numbers, and the attributes of a
    callback that its `keeps`, a tuple of strings, names. A fit on the CPU that is
    killed and started again ends with the same bits, without persistent workers.
    One object, and one file, serve one fit; `fine_tune` makes two, and cannot take it.
    Raises: ValueError, before anything changes, for a file of another training.
    """
    order, only_fit = math.inf, True    # last: it saves what all did
    file, finished = None, False

    def __init__(self, fname, every=1, resume=True):
        self.fname, self.every, self.resume = fname, every, resume

    def before_fit(self):
        check(not self.finished, "a CheckpointCallback serves one fit: make another")
        self.file = Path(self.learn.model_file(self.fname))
        # what must be the same for a fit to go on where another one stopped
        self.saved = self.learn.cbs    # without those that are added in mid-fit
        self.plan = {'n_epoch': self.n_epoch, 'n_iter': length_hint(self.dls.train),
                     'cbs': [cb.name for cb in self.saved], 'processes': n_processes(),
                     'lr, wd': [(h['lr'], h.get('wd')) for h in self.opt.hypers]}
        if self.resume and self.file.exists():
            self.go_on_from(load_state(self.file))

    def after_epoch(self):
        n_done = self.epoch + 1
        # the last one is saved when the fit ends, as others may still work then
        if self.completed and n_done % self.every == 0 and n_done < self.n_epoch:
            self.save(n_done)

    def after_fit(self):
        # if the fit was ended in the middle of a pass, the file of the last epoch stays
        is_over = self.completed or self.iter + 1 >= self.n_iter
        if self.file is not None and not self.failed and is_over:
            self.save(self.n_epoch)
            self.finished = True

    def save(self, n_done):
        """Write the state of all that takes part, after `n_done` epochs."""
        learn = self.learn
        state = {'model': bare_state(learn.model), 'opt': learn.opt.state_dict(),
                 'loss_func': getattr(learn.loss_func, 'state_dict', dict)(),
                 'cbs': [cb.state_dict() for cb in self.saved], 'n_done': n_done,
                 'frozen_idx': learn.opt.frozen_idx, 'train_iter': learn.train_iter,
                 'rng': rng_state(learn.dls), 'plan': self.plan}
        save_state(state, self.file)
        if n_done == self.every and process_rank() == 0:
            load_state(self.file)    # what cannot be read is an error now, not later

    def go_on_from(self, state):
        """Take over what `save` wrote."""
        check('plan' in state, f"{self.file} is no checkpoint: say resume=False")
        learn, plan, n_done = self.learn, state['plan'], state['n_done']
        differ = {k: plan.get(k) for k, v in self.plan.items() if plan.get(k) != v}
        check(not differ, f"{self.file} is of another fit, with {differ}: resume=False "
              "replaces it. To train longer, load it, and fit with another file")
        is_module = isinstance(learn.loss_func, nn.Module)
        loss_func = learn.loss_func if is_module else nn.Module()
        put_state(self.file, state['loss_func'], copy.deepcopy(loss_func), None)  # try
        put_state(self.file, state, learn.model, learn.opt)
        loss_func.load_state_dict(state['loss_func'])
        for cb, own in zip(learn.cbs, state['cbs'], strict=True):
            cb.load_state_dict(to_device(own, learn.dls.device))
        if state['frozen_idx'] != learn.opt.frozen_idx:
            learn.opt.freeze_to(state['frozen_idx'])
        learn.start_epoch, learn.train_iter = n_done, state['train_iter']
        say(learn, f"resumed {self.file}: {self.n_epoch - n_done} epochs are left")
        set_rng_state(state['rng'], learn.dls)

Callback.keeps = ()    # names of the attributes that a checkpoint keeps

@patch
def state_dict(self: Callback):
    """What a checkpoint keeps of this callback: the attributes in `keeps`."""
    return {k: getattr(self, k) for k in self.keeps}

@patch
def load_state_dict(self: Callback, state):
    """Take over what `state_dict` gave."""
    vars(self).update(state)

@patch
def state_dict(self: Recorder):
    """The history so far; the losses as one tensor."""
    loss = torch.stack(self.losses) if self.losses else torch.empty(0)
    return {'lrs': self.lrs, 'iters': self.iters, 'values': self.values, 'losses': loss}

@patch
def load_state_dict(self: Recorder, state):
    """Go on with the history that `state_dict` gave."""
    vars(self).update(state, losses=list(state['losses']))
    if self.losses:
        smooth = self.train_mets[0]
        smooth.value, smooth.count = self.losses[-1], len(self.losses)
        self.learn.smooth_loss = smooth.value
    self.learn.final_record = (self.values or [None])[-1]

# 17. Many processes: the same training on several GPUs, or on several CPU cores
# --------------------------------------------------------------------------------------
# Needs: 8, 10
class DistributedCallback(Callback):
    """Each process trains and predicts on its share of the rows; `distrib_ctx` adds it.

    While training, `learn.model` is torch's DistributedDataParallel around the model,
    which averages the gradients. Shares of a training are those of torch's
    DistributedSampler: of equal size, so that a few rows may come twice. In other
    passes none does, and what cannot be split is read by the first process alone.
    Metrics are `AvgMetric`s, whose sums are added up, or join themselves, as those of
    torchmetrics do by `sync_on_compute = True`. kwargs: of DistributedDataParallel.
    """
    order = -20    # before others look at losses and metrics, or cancel something

    def __init__(self, **kwargs):
        self.kwargs = kwargs

    def before_fit(self):
        """Make `sampler`, which shuffles if the loader does, by a seed for all."""
        dl = self.dls.train
        rows = in_order(dl)
        weighs = isinstance(getattr(dl, 'sampler', 0), data_tools.WeightedRandomSampler)
        check(rows is not dl and not weighs, f"{type(dl).__name__} cannot be split: "
              "use a TensorLoader, or an unweighted DataLoader with indices", TypeError)
        in_turn = isinstance(getattr(dl, 'sampler', 0), data_tools.SequentialSampler)
        shuffle = getattr(dl, 'shuffle', not in_turn)
        seed = self.gather(int(torch.randint(2**31, ())))[0]
        self.sampler = data_tools.DistributedSampler(rows.dataset, shuffle=shuffle,
                                                     seed=seed)

    def before_train(self):
        """Wrap the model, anew for each epoch, as layers may have been frozen."""
        wrap, dl = nn.parallel.DistributedDataParallel, self.dls.train
        self.learn.model = wrap(self.model, **self.kwargs)
        self.sampler.set_epoch(self.epoch)
        self.learn.dl = in_order(dl, list(self.sampler), dl.drop_last,
                                 rng=getattr(dl, 'generator', None))

    def after_batch(self):
        """In training, the loss is from here on the mean over all processes."""
        if self.completed and self.training and self.yb:
            self.learn.loss = to_detach(self.loss.mean(), cpu=False).mean()

    def after_train(self):
        self.learn.model = getattr(self.model, 'module', self.model)
        if self.completed:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)    # the first one saves them
            self.join('train_mets', 1)    # without the smoothed loss, a joint one

    def before_validate(self):
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.learn.model = self.model.module    # it is in the middle of a training
        rows, rank, n = in_order(self.dl), process_rank(), n_processes()
        if rows is not self.dl:
            share = torch.arange(len(rows.dataset)).tensor_split(n)[rank]
            self.learn.dl = in_order(rows, share.tolist())
        elif rank > 0:
            self.learn.dl = []

    def after_validate(self):
        if self.completed:
            self.join('valid_mets')

    def join(self, mets, start=0):
        """Add up the sums of metrics, and put collected predictions together."""
        for cb in self.learn.cbs:
            for m in vars(cb).get(mets, ())[start:]:
                if isinstance(m, AvgMetric):
                    sums = self.gather((float(m.total), m.count))
                    m.total, m.count = map(sum, zip(*sums))
                else:
                    syncs = getattr(getattr(m, 'metric', m), 'sync_on_compute', False)
                    check(syncs, f"metric {m.name!r} is of one process's rows: give a "
                          "function, or validate after distrib_ctx", TypeError)
            if isinstance(cb, GatherPredsCallback):
                for kept in (cb.inputs, cb.preds, cb.targets, cb.losses):
                    kept[:] = [b for part in self.gather(kept) for b in part]

    def gather(self, o):
        """What each process has for `o`, a list."""
        parts = [None] * n_processes()
        torch.distributed.all_gather_object(parts, o)
        return parts

    def state_dict(self):
        """What decides who gets which rows, and each process's random numbers."""
        return {'seed': self.sampler.seed, 'rng': self.gather(rng_state(self.dls))}

    def load_state_dict(self, state):
        """Go on with the same shares and random numbers."""
        self.sampler.seed = state['seed']
        set_rng_state(state['rng'][process_rank()], self.dls)

def leave_group():
    """At exit, leave torch's group of processes together, or Gloo may abort one."""
    gc.collect()    # models that DistributedDataParallel has wrapped refer to the group
    with suppress(RuntimeError, ValueError):    # another has failed; it is not Gloo
        torch.distributed.monitored_barrier(timeout=timedelta(seconds=20))
    if torch.distributed.is_initialized():    # unless you have destroyed it
        torch.distributed.destroy_process_group()

@patch
@contextmanager
def distrib_ctx(self: Learner, **kwargs):
    """Context in which every process that torchrun has started trains on its share.

        with learn.distrib_ctx():       # torchrun --nproc_per_node=8 script.py
            learn.fit_one_cycle(5)

    All processes run the same script, and have to make the same learner: call
    `set_seed` first. In each of them, losses, metrics and predictions are those of all
    data; only the first prints and saves. `bs` is the size of a batch in each.
    Without torchrun, the one process trains alone, with a warning.
    kwargs: of DistributedDataParallel. Yields: the learner.
    """
    alone = not torch.distributed.is_torchelastic_launched()
    if alone:
        warnings.warn("one process trains alone: start torchrun --nproc_per_node=2")
    if alone or 'distributed' in vars(self):    # or inside of another such context
        yield self
        return
    is_cuda = self.dls.device.type == 'cuda'
    if is_cuda:
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
        self.dls.cuda()    # where the data then stays
    if not torch.distributed.is_initialized():    # it stays, as torch starts it once
        torch.distributed.init_process_group('nccl' if is_cuda else 'gloo')
    atexit.unregister(leave_group)    # after an error, nobody waits for others
    quiet = self.no_logging() if process_rank() > 0 else nullcontext()
    with quiet, self.added_cbs(DistributedCallback(**kwargs)):
        yield self
        torch.distributed.barrier()    # so that what one has saved, all can load
    atexit.register(leave_group)

# 18. Speed: the step functions, unchanged, on many parameters at once
# --------------------------------------------------------------------------------------
# Needs: 13
class TensorList:
    """Many tensors that answer to the methods of one, by torch's multi-tensor kernels.

    `t.add_(u, alpha=2)` is `torch._foreach_add_(t.tensors, u.tensors, alpha=2)`, to the
    same last bit, and costs little more than for a single tensor.
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

    data = property(lambda self: self)
    grad = property(lambda self: TensorList([t.grad for t in self.tensors]))

FAST_STEPS = {sgd_step, weight_decay, l2_reg, average_grad, average_sqr_grad,
              momentum_step, rms_prop_step, step_stat, adam_step}
one_by_one = Optimizer.step.__wrapped__    # without a second no_grad

@patch
@torch.no_grad()
def step(self: Optimizer):
    """Run the step functions; this file's own once for all parameters alike."""
    steps = (f.func if isinstance(f, partial) else f for f in self.cbs)
    if sum(map(len, self.param_lists)) <= 8 or not FAST_STEPS.issuperset(steps):
        return one_by_one(self)    # few are fast anyway
    alike = defaultdict(list)
    for p, _, state, hyper in self.all_params(with_grad=True):
        others = [v for v in state.values() if not isinstance(v, Tensor)]
        kind = id(hyper), p.device, p.dtype, tuple(state), str(others)
        alike[kind].append((p, state, hyper))
    for items in alike.values():
        ps, states, (hyper, *_) = zip(*items)
        joint, new = dict(states[0]), {}    # equal in all, but for the tensors
        for k, v in joint.items():
            if isinstance(v, Tensor):
                joint[k] = TensorList([state[k] for state in states])
        for f in self.cbs:
            new.update(run_step(f, TensorList(ps), {**joint, **new}, hyper))
        for k, v in new.items():
            values = v.tensors if isinstance(v, TensorList) else [v] * len(states)
            for state, value in zip(states, values):
                state[k] = value

# 19. Pictures and progress: data, predictions, the course of a training
# --------------------------------------------------------------------------------------
# Needs: 8, 10
def new_axes(n_rows=1, n_cols=1, figsize=None):
    """Array (n_rows, n_cols) of axes in a new matplotlib figure."""
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=figsize, layout='constrained')
    return figure.subplots(n_rows, n_cols, squeeze=False)

def show_samples(xs, titles=None, ax=None):
    """Draw samples, each with its title; returns the array of matplotlib axes.

    xs: signals (B, L), (B, 1, L) or images (B, H, W), (B, C, H, W); or a tuple of such.
    ax: an array of axes, at least one per sample; default: a square grid.
    """
    xs = first_item(xs).detach().float().cpu().numpy()
    side = math.ceil(math.sqrt(len(xs)))
    axs = new_axes(side, side, [1 + 1.5 * side] * 2) if ax is None else ax
    for i, one in enumerate(axs.flat):
        one.set(xticks=[], yticks=[], visible=i < len(xs))
    for one, x, title in zip(axs.flat, xs, titles or [''] * len(xs)):
        x = x.squeeze()
        draw = partial(one.imshow, cmap='gray') if x.ndim > 1 else one.plot
        draw(x.transpose(1, 2, 0) if x.ndim == 3 else x)
        one.set_title(title, fontsize=9)
    return axs

def caption(dls, y):
    """What stands over a picture: numbers are rounded, larger tensors left out."""
    y = dls.decoded(y)
    if isinstance(y, Tensor):
        y = y.item() if y.numel() == 1 else ''
    return f'{y:.4g}' if isinstance(y, float) else str(y)

@patch
def show_batch(self: DataLoaders, max_n=9):
    """Draw up to `max_n` samples of a training batch; see `show_samples`."""
    xb, yb = map_tensors(lambda t: t[:max_n], self.split_batch(self.one_batch()))
    return show_samples(xb, [caption(self, y) for y in yb[0]] if yb else None)

@patch
def show_results(self: Learner, ds_idx=1, dl=None, max_n=9, shuffle=True, ax=None):
    """Draw up to `max_n` samples, target over prediction; returns the array of axes.

    shuffle: any of a batch, not the first ones. For inputs and ax see `show_samples`.
    """
    batch = next(iter(in_order(find_loader(self.dls, ds_idx, dl))))
    x, _, y, decoded = self.get_preds(dl=[batch], with_input=True, with_decoded=True)
    y, decoded, dls = first_item(y), first_item(decoded), self.dls
    rows = list(range(len(decoded)))
    rows = random.Random().sample(rows, len(rows))[:max_n] if shuffle else rows[:max_n]
    titles = [f'{caption(dls, y[i])}\n{caption(dls, decoded[i])}' for i in rows]
    return show_samples(map_tensors(lambda t: t[rows], x), titles, ax)

@patch
def plot_loss(self: Recorder, skip_start=5, with_valid=True, log=False, ax=None):
    """Draw the smoothed training loss from batch `skip_start` on; returns the axes.

    with_valid: and the validation loss of each epoch. log: logarithmic axis.
    ax: matplotlib axes to draw into.
    """
    ax, losses = ax or new_axes()[0, 0], [float(loss) for loss in self.losses]
    ax.plot(range(skip_start, len(losses)), losses[skip_start:], label='train')
    if with_valid and self.valid_mets:
        valid = [row[len(self.train_mets)] for row in self.values]
        ax.plot(self.iters, valid, '.-', label='valid')
    ax.set(xlabel='batch', ylabel='loss', yscale='log' if log else 'linear')
    ax.legend()
    return ax

@patch
def plot_sched(self: Recorder, keys=None, figsize=None):
    """Draw the hypers that a schedule has set, by batch; returns the array of axes.

    keys: their names; default: all. figsize: of the figure, in inches.
    """
    keys = list(self.hps) if keys is None else listify(keys)
    check(keys, "no hyper was scheduled in the last fit: try fit_one_cycle")
    axs = new_axes(1, len(keys), figsize or (6.4 * len(keys), 4.8))
    for ax, key in zip(axs.flat, keys):
        ax.plot(self.hps[key])
        ax.set(xlabel='batch', ylabel=key)
    return axs

@patch
def plot_lr_find(self: Recorder, skip_end=5, suggestions=None):
    """Draw the loss by learning rate, as `lr_find` left it; returns the axes.

    skip_end: batches to leave out, as the loss explodes. suggestions: of `lr_find`.
    """
    ax, n = new_axes()[0, 0], max(1, len(self.losses) - skip_end)
    ax.plot(self.lrs[:n], [float(loss) for loss in self.losses[:n]])
    ax.set(xlabel='learning rate', ylabel='loss', xscale='log')
    if suggestions:
        for i, (name, lr) in enumerate(suggestions._asdict().items(), 1):
            ax.axvline(lr, linestyle='--', color=f'C{i}', label=f'{name}: {lr:.1e}')
        ax.legend()
    return ax

class ProgressCallback(Callback):
    """Prints the Recorder's rows as a table, with a bar below it while a pass runs.

    It replaces `print` as the logger. The bar needs a terminal or a notebook.
    """
    order, only_fit, has_bar, drawn_at = 55, True, False, 0.

    def before_fit(self):
        if self.logger in (print, self.write_row) and 'recorder' in vars(self.learn):
            self.has_bar = sys.stdout.isatty() or 'ipykernel' in sys.modules
            self.learn.logger = self.write_row
            self.write_row(self.recorder.metric_names)

    def after_fit(self):
        if self.logger == self.write_row:
            self.learn.logger, self.has_bar = print, False

    def write_row(self, row):
        """Print the cells, 10 wide or more (epoch: 5), 2 spaces apart."""
        widths = [5, *(max(len(name), 10) for name in self.recorder.metric_names[1:])]
        text = '  '.join(map(format_cell, row, widths))
        print(text.ljust(60 if self.has_bar else 0), flush=True)    # over the bar

    def after_batch(self):
        """Draw at most 10 times a second: reading the loss waits for the device."""
        if self.has_bar and time.perf_counter() - self.drawn_at > 0.1:
            self.drawn_at = time.perf_counter()
            text = (f'epoch {self.epoch + 1}/{self.n_epoch} batch {self.iter + 1}/'
                    f'{self.n_iter or "?"} loss {batch_loss(self):.4f}')
            print(f'{text:60}', end='\r', flush=True)

def format_cell(v, width):
    """A cell of the table: floats with six decimals, or as 1.23e+04; None is empty."""
    text = '' if v is None else str(v)
    if isinstance(v, float):
        text = f'{v:.6f}' if len(f'{v:.6f}') <= width else f'{v:.2e}'
    return text.rjust(width)

defaults.callbacks.append(ProgressCallback)

@patch
def no_bar(self: Learner):
    """Context without bar and table: rows go to `logger` as lists."""
    return self.removed_cbs(ProgressCallback)

Learner.no_mbar = no_bar

@patch
def show_training_loop(self: Learner):
    """Print the events of a fit, indented, with the callbacks of each."""
    timeline = inspect.cleandoc(event.__doc__).partition('\n\n')[2]
    for line in timeline.splitlines():
        indent, dash, name = line.partition('- ')
        name = name.split('  ')[0]
        print(f'{indent}- {name:15}: {self.ordered_cbs(name)}' if dash else line)

def init_args(self):
    """Arguments of Learner and callbacks: `{'Learner.__init__.lr': 0.001, ...}`."""
    return {f'{type(o).__name__}.__init__.{k}': getattr(o, k)
            for o in (self, *self.cbs)
            for k in inspect.signature(type(o)).parameters if k in vars(o)}

Learner.init_args = property(init_args)

# 20. Demo: a small network learns MNIST-1D, a data set that needs no download
# --------------------------------------------------------------------------------------
# Needs: 9, 19
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
    rng = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=rng) % 10
    shapes = torch.tensor([float(v) for v in MNIST1D_SHAPES.split()]).view(10, 12)
    shapes = (shapes - shapes.mean(1, True)) / shapes.std(1, correction=0, keepdim=True)
    shapes = (shapes - shapes[:, :1]) / 6 + 1e-8    # so that only padding is exactly 0
    x = F.pad(shapes, (0, 60))[y]
    # stretch the shape and a random length of padding over 72 points
    at = torch.linspace(0, 1, 72) * torch.randint(47, 72, (n, 1), generator=rng)
    left = at.long().clamp(max=70)
    x = torch.lerp(x.gather(1, left), x.gather(1, left + 1), at - left)
    x = x * (1 + 0.4 * (torch.rand(n, 1, generator=rng) - 0.5))
    x = x.gather(1, (torch.arange(72) - torch.randint(48, (n, 1), generator=rng)) % 72)
    # correlated noise in the padding, a little independent noise everywhere
    kernel = torch.exp(-torch.arange(-8, 9) ** 2 / 8)
    noise = 0.25 * torch.randn(n, 72, generator=rng)
    noise = torch.cat([noise[:, :8].flip(1), noise, noise[:, -8:].flip(1)], 1)
    noise = F.conv1d(noise[:, None], (kernel / kernel.sum())[None, None])[:, 0]
    x = torch.where(x == 0, noise, x) + 0.02 * torch.randn(n, 72, generator=rng)
    x = x - 0.75 * (torch.rand(n, 1, generator=rng) - 0.5) * torch.linspace(-.5, .5, 72)
    x = F.interpolate(x[:, None], 40, mode='linear', align_corners=True)
    x, cut = (x - x.mean()) / x.std(correction=0), n * 4 // 5
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])

def small_cnn():
    """A network for `mnist1d`: (B, 1, 40) signals to (B, 10) scores; 24,154 weights."""
    def block(n_in, n_out, stride):
        conv = nn.Conv1d(n_in, n_out, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm1d(n_out), nn.ReLU())
    body = nn.Sequential(block(1, 16, 1), block(16, 32, 2), block(32, 32, 1),
                         block(32, 64, 2), block(64, 64, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(body, head)

def demo(n_epoch=15, seed=0, folder='.'):
    """Train `small_cnn` on MNIST-1D; draw nine predictions; returns the accuracy."""
    set_seed(seed)
    train, test = mnist1d()
    dls = DataLoaders.from_tensors(*train, valid=test)
    learn = Learner(dls, small_cnn(), nn.CrossEntropyLoss(), metrics=accuracy)
    learn.fit_one_cycle(n_epoch, 1e-2)
    score, file = learn.final_record[-1], Path(folder, 'minilearner_demo.png')
    learn.show_results().flat[0].figure.savefig(file)
    print(f"test accuracy {score:.1%} (published CNN: 94 %), figure: {file}")
    return score

if __name__ == '__main__':
    demo()

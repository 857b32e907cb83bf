#!/usr/bin/env python3
"""README's comparison, checked by running each of the libraries that is installed.

    python .ci/compare.py

All train the same small network with dropout, on a shuffled loader and the CPU.

  lines, packages   of Python, without tests; what it requires, torch included
  misspelt event    what happens to a callback whose method is named after_bacth or the like
  resumed           whether the weights are the same bits, if a training of 4 epochs ends
                    after 2, and a new learner, seeded as at the start, goes on from its file
  lr_find           whether weights, and torch's random state, are afterwards as before
"""
import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
X = torch.randn(256, 10, generator=torch.Generator().manual_seed(0))
Y = X[:, :1] * 2


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def loader():
    return DataLoader(TensorDataset(X, Y), 32, shuffle=True)


def same_bits(train_whole, train_in_two):
    """Whether two models have the same weights, each trained by a function that seeds first."""
    def trained(train):
        return [p.detach().clone() for p in train().parameters()]
    whole = trained(train_whole)
    assert all(map(torch.equal, whole, trained(train_whole))), 'it differs without an interruption, too'
    return all(map(torch.equal, whole, trained(train_in_two)))


def restored(model, search):
    """Whether `search` leaves the weights, and torch's random state, as they were."""
    weights, rng = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    search()
    same = all(map(torch.equal, weights, model.parameters()))
    return f'weights {same}, random state {torch.equal(rng, torch.get_rng_state())}'


def reaction(train):
    """What happens in `train`, which has a misspelt event."""
    try:
        train()
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return 'ignored'


# Of each library: a function that returns the three results ------------------------------
def minilearner():
    sys.path.insert(0, str(ROOT))
    import minilearner as ml

    def learner(*cbs):
        dls = ml.DataLoaders(loader(), device='cpu')
        learn = ml.Learner(dls, network(), nn.MSELoss(), cbs=[*cbs])
        learn.logger = lambda row: None
        return learn

    def kill(self):
        if self.epoch == 2:
            raise KeyboardInterrupt

    def typo():
        class Typo(ml.Callback):
            def after_bacth(self):
                pass
        learner(Typo).fit(1)

    def fit(learn, *cbs):
        with contextlib.suppress(KeyboardInterrupt):
            learn.fit(4, 0.01, cbs=[*cbs])
        return learn

    def in_two():
        fit(learner(ml.Callback(before_epoch=kill)), ml.CheckpointCallback('run'))
        return fit(learner(ml.Callback()), ml.CheckpointCallback('run')).model

    learn = learner()
    return (reaction(typo), same_bits(lambda: fit(learner()).model, in_two),
            restored(learn.model, lambda: learn.lr_find(show_plot=False)))


def fastai():
    import fastai.callback.schedule  # noqa: F401 (it adds lr_find)
    from fastai.callback.core import Callback, CancelFitException
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as FastaiLoader
    from fastai.learner import Learner
    from fastai.torch_core import set_seed

    class Typo(Callback):
        def after_bacth(self):
            raise RuntimeError('it was called')

    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 2:
                raise CancelFitException

    def learner(cbs=None):
        set_seed(3)
        rows = list(zip(X, Y))
        dls = DataLoaders(FastaiLoader(rows, bs=32, shuffle=True), FastaiLoader(rows, bs=32))
        return Learner(dls, network(), nn.MSELoss(), cbs=cbs, path='.')

    def fit(learn, *args, **kwargs):
        with learn.no_bar(), learn.no_logging():
            learn.fit(*args, **kwargs)
        return learn

    def in_two():
        fit(learner(Stop()), 4, 0.01).save('half', with_opt=True)
        resumed = learner()
        resumed.create_opt()
        return fit(resumed.load('half', with_opt=True), 4, 0.01, start_epoch=2).model

    learn = learner()
    return (reaction(lambda: fit(learner(Typo()), 1)),
            same_bits(lambda: fit(learner(), 4, 0.01).model, in_two),
            restored(learn.model, lambda: learn.lr_find(show_plot=False)))


def lightning():
    import lightning
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from lightning.pytorch.tuner import Tuner

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.lr = network(), 0.01

        def training_step(self, batch, i):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), self.lr)

    class Typo(Callback):
        def on_train_bacth_end(self, *args):
            raise RuntimeError('it was called')

    def trainer(n_epoch, **kwargs):
        return lightning.Trainer(max_epochs=n_epoch, accelerator='cpu', logger=False,
                                 enable_progress_bar=False, enable_model_summary=False, **kwargs)

    def fit(n_epoch, callback, path=None):
        lightning.seed_everything(3, verbose=False)
        model = Module()
        trainer(n_epoch, callbacks=[callback]).fit(model, loader(), ckpt_path=path)
        return model

    def saving(folder):
        return ModelCheckpoint(dirpath=folder, save_last=True, every_n_epochs=1)

    def in_two():
        fit(2, saving('half'))
        return fit(4, saving('half'), 'half/last.ckpt')

    model, tuner = Module(), Tuner(trainer(1, enable_checkpointing=False))
    return (reaction(lambda: fit(1, Typo())), same_bits(lambda: fit(4, saving('whole')), in_two),
            restored(model, lambda: tuner.lr_find(model, loader(), num_training=40)))


def skorch():
    from skorch import NeuralNetRegressor
    from skorch.callbacks import Callback, Checkpoint, LoadInitState

    class Typo(Callback):
        def on_bacth_end(self, net, **kwargs):
            raise RuntimeError('it was called')

    def fit(n_epoch, *callbacks):
        net = NeuralNetRegressor(network, max_epochs=n_epoch, lr=0.01, optimizer=torch.optim.Adam,
                                 verbose=0, iterator_train__shuffle=True, callbacks=[*callbacks])
        return net.fit(X.numpy(), Y.numpy()).module_

    def saving():
        return Checkpoint(monitor=None, dirname='half')

    def in_two():
        fit(2, saving())
        return fit(2, LoadInitState(saving()))

    return reaction(lambda: fit(1, Typo())), same_bits(lambda: fit(4), in_two), 'has none'


def size(name):
    """Lines of Python without tests, and how many packages are required."""
    if name == 'minilearner':
        return len((ROOT / 'minilearner.py').read_text().splitlines()), 2
    dist = importlib.metadata.distribution(name)
    files = [f for f in dist.files if f.suffix == '.py' and 'tests' not in f.parts]
    n_lines = sum(len(f.read_text(encoding='utf-8').splitlines()) for f in files)
    required = {re.match(r'[\w.-]+', r)[0] for r in dist.requires if 'extra ==' not in r}
    return n_lines, len(required | {'torch'})


def main():
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    os.environ['MPLBACKEND'] = 'agg'
    for library in (minilearner, fastai, lightning, skorch):
        name = library.__name__
        if name != 'minilearner' and importlib.util.find_spec(name) is None:
            print(f'{name}: not installed')
            continue
        version = 'here' if name == 'minilearner' else importlib.metadata.version(name)
        os.chdir(tempfile.mkdtemp())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            event, resumed, search = library()
        print('{} {}: {} lines, {} packages'.format(name, version, *size(name)))
        print(f'  misspelt event: {event}\n  resumed: same bits {resumed}\n  lr_find: {search}', flush=True)


if __name__ == '__main__':
    main()

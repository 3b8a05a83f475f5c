"""`neo tune` where it is killed: it goes on where it was, with the same trials, and counts the time that was lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neo_nb.recipes.tune import ended_trials, open_study, search_space, settings_of, spent_minutes, tune
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.callbacks import Callback, CallbackFailed
from neo_nb.train.config import make_config
from neo_nb.train.trainer import train

SHORT = {"size": (64, 96), "batch_size": 4, "epochs": 2, "passes_per_epoch": 2, "device": "cpu", "num_queries": 60}
WORK = """
import json, sys
from pathlib import Path
from neo_nb.recipes.tune import tune
from neo_nb.synthetic.crowds import make_scenes
from neo_nb.train.config import make_config
folder = Path(sys.argv[1])
images = make_scenes(8, (64, 96), 0, folder / "scenes")
config = make_config(**json.loads(sys.argv[2]))
tune(config, folder / "run", images, images, trials=2)
"""


def wait_for(path: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 600
    while not path.exists() and time.monotonic() < end:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    assert path.exists()


def test_a_tuning_that_is_killed_goes_on_with_the_trial_it_was_in(tmp_path):
    words = [sys.executable, "-c", WORK, str(tmp_path), json.dumps(SHORT | {"checkpoint_steps": 1})]
    process = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(tmp_path / "run/trials/001/weights/last.pt", process)  # in the second trial
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = tmp_path / "run"
    with (run / "study.journal").open("ab") as file:
        file.write(b'{"op_code": 8, "worker_')  # as a killed process may leave it
    (run / "study.journal.lock").touch()
    before = [trial.params for trial in open_study(run).trials]
    images = make_scenes(8, (64, 96), 0, tmp_path / "scenes")
    config = make_config(**SHORT, checkpoint_steps=1)
    study = tune(config, run, images, images, trials=2)
    states = [trial.state.name for trial in study.trials]
    assert states[:2] == ["COMPLETE", "FAIL"] and len(ended_trials(study)) == 2 and len(states) == 3
    revived = study.trials[2]
    assert revived.params == before[1] and revived.user_attrs["folder"] == 1
    assert revived.user_attrs["lost_minutes"] >= 0
    whole = sum(trial.user_attrs["minutes"] for trial in ended_trials(study))
    assert spent_minutes(study) == pytest.approx(whole + revived.user_attrs["lost_minutes"])
    assert settings_of(config, study.trials[0].params) == {}, "the first trial is the default"
    assert study.best_value >= study.trials[0].value
    assert (run / "weights/best.safetensors").is_file() and not list(run.rglob("last.pt"))
    other = tune(config, tmp_path / "straight", images, images, trials=2)  # never killed: the same settings
    assert other.trials[1].params == revived.params


def test_a_budget_ends_it_and_what_is_frozen_is_not_tried(tmp_path):
    images = make_scenes(4, (64, 96), 0, tmp_path / "scenes")
    config = make_config(**SHORT | {"epochs": 1, "minutes": 5.0})
    study = tune(config, tmp_path / "run", images, images, trials=3, minutes=2.5)
    assert len(ended_trials(study)) == 1, "time for half of another trial is no longer there"
    assert "backbone_lr" not in search_space(make_config(freeze_backbone=True))


def test_a_callback_that_raises_ends_the_training_with_its_name(tmp_path):
    class Mailer(Callback):
        def on_epoch(self, trainer, epoch):
            raise ConnectionError("no mail today")

    images = make_scenes(4, (64, 96), 0, tmp_path / "scenes")
    config = make_config(**SHORT | {"epochs": 1}, tracker="none")
    with pytest.raises(CallbackFailed, match="the callback Mailer.on_epoch failed: ConnectionError: no mail today"):
        train(config, tmp_path / "run", images, images, callbacks=[Mailer()])

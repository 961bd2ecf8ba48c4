"""Teachers that say little in one layer teach in the others, and leave the task its say."""

from statistics import mean

import pytest
from adapters import AutoAdapterModel
from tiny_models import CONFIGS, TEACHERS, make_dataset, noisy
from trainings import trainer_for
from transformers import set_seed

import hf_adapter_distillation as had
from hf_adapter_distillation.method.layers import adapter_layers


def losses(scale, trainer_args, start=0.2, **settings):
    """The first distillation loss, the largest norm of a gradient and the last task loss of a training."""
    set_seed(0)
    config = CONFIGS["bert"](hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.num_hidden_layers = 4
    model = AutoAdapterModel.from_config(config)
    for name in TEACHERS:
        model.add_adapter(name)
        noisy(model, name, 0.1)
        for parameter in adapter_layers(model, name)[1][1].adapters[name].adapter_up.parameters():
            parameter.data *= scale
    set_seed(1)
    config = had.DistillationConfig(TEACHERS, student_start="random", **settings)
    model.add_adapter("insurance", distill_from=config)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    args = trainer_args(distillation_start=start, max_steps=30, learning_rate=5e-3, per_device_train_batch_size=8)
    trainer = trainer_for(model, args, train_dataset=make_dataset(64))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "task_loss" in log]
    distillation = [log["distillation_loss"] for log in logs if "distillation_loss" in log]
    return (
        (distillation or [0.0])[0],
        max(log["grad_norm"] for log in logs),
        mean(log["task_loss"] for log in logs[-8:]),
    )


@pytest.mark.parametrize(("objective", "scales"), [("features", [0.1, 1e-6]), ("task_specific", [1e-3])])
def test_a_layer_that_says_little_does_not_drown_the_task(objective, scales, trainer_args):
    ordinary = losses(1.0, trainer_args, objective=objective)
    for scale in scales:
        silent = losses(scale, trainer_args, objective=objective)
        assert silent[0] < 5 * ordinary[0]
        assert silent[1] < 5 * ordinary[1]
        assert silent[2] < ordinary[2] + 0.1

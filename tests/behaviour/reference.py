"""One training forward pass of a distilled student, written from the equations of the docs; no code of the package.

A plain model of transformers runs with the student at its places, in float64. What the adapters and the fusions of the
model under test hold is read by the names of their parameters.
"""

from math import log
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, relu, silu
from transformers.pytorch_utils import Conv1D

ACTIVATIONS = {"relu": relu, "gelu": gelu, "swish": silu}
MINIMAL_VARIANCE, MINIMAL_WEIGHT, FLOOR = 1e-6, 1e-6, 0.1
LAYERS = ("BertLayer", "GPT2Block")


class Weights:
    """The parameters of one adapter at one place."""

    def __init__(self, parameters, config):
        self.parameters, self.config = parameters, config

    @property
    def reads(self):
        """Which of the states at a place the adapter reads."""
        return "input" if self.config.get("is_parallel") else "output"

    def update(self, states):
        """The update of the states, (batch, seq_len, hidden), that the adapter reads."""
        get = self.parameters.__getitem__
        if "lora_A" in self.parameters:
            return states @ get("lora_A").T @ get("lora_B").T * self.config["alpha"] / self.config["r"]
        features = ACTIVATIONS[self.config["non_linearity"]](
            states @ get("adapter_down.0.weight").T + get("adapter_down.0.bias")
        )
        return (features @ get("adapter_up.weight").T + get("adapter_up.bias")) * self.config["scaling"]


class Terms(NamedTuple):
    """The terms of a pass; the loss is that of the carrier `dual`, of both passes."""

    logits: torch.Tensor
    task_loss: torch.Tensor | float
    distillation_loss: torch.Tensor
    regularization: torch.Tensor


class Reference:
    """A plain copy of a model for the classes of tokens with a student, whose places are those of `carrier`.

    Args:
        model: The model under test.
        plain: A model of transformers without adapters and without a head, of the same config.
        configs: The configs of the adapters by their names, the student's last.
        carrier: "student", "fused", "dual", or "mixed" for the states of the student beside a match with the fused
            ones.
        weights: The weights of the teachers by their names; None if they are equal and there is no null teacher.
    """

    def __init__(self, model, plain, configs, carrier, weights=None):
        self.prefix = f"{model.base_model_prefix}."
        self.parameters = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()
        }
        self.configs, self.carrier, self.weights = configs, carrier, weights
        *self.teachers, self.student = configs
        self.layers, self.active = [], self.student
        self.plain = plain.double().eval()
        frozen = {name: self.parameters.get(self.prefix + name, p).detach() for name, p in plain.state_dict().items()}
        self.plain.load_state_dict(frozen)
        self.plain.requires_grad_(False)
        self.change_places()

    def at(self, place, container, name):
        """The parameters of an adapter, or of the fusion, at a place; empty where there is none."""
        prefix = f"{self.prefix}{place}.{container}.{name}."
        return {key[len(prefix) :]: p for key, p in self.parameters.items() if key.startswith(prefix)}

    def adapter(self, place, container, name):
        parameters = self.at(place, container, name)
        return Weights(parameters, self.configs[name]) if parameters else None

    def fuse(self, fusion, states, updates):
        """Fuse updates by their names, read at the states, (batch, seq_len, hidden)."""
        query = states @ fusion["query.weight"].T + fusion["query.bias"]
        scores = [(query * (update @ fusion["key.weight"].T)).sum(dim=-1) for update in updates.values()]
        scale = max(1.0, sum((self.weights or {}).values()))
        if self.weights is not None:  # the null teacher has the score 0, and an update of zero
            values = {name: max(weight / scale, MINIMAL_WEIGHT) for name, weight in self.weights.items()}
            values.setdefault(self.student, sum(values.values()) / len(values))
            null = max(1 - sum(self.weights.values()) / scale, MINIMAL_WEIGHT)
            scores = [score + log(values[name]) for name, score in zip(updates, scores, strict=True)]
            scores.append(torch.full_like(scores[0], log(null)))
        attention = torch.stack(scores, dim=-1).softmax(dim=-1)
        fused = sum(scale * attention[..., n : n + 1] * update for n, update in enumerate(updates.values()))
        return fused @ fusion["value.weight"].T if "value.weight" in fusion else fused

    def match(self, fusion, states, own, updates):
        """Fuse the updates, and note the student's and the fused one; return the fused one."""
        fused = self.fuse(fusion, states, updates | ({self.student: own} if self.joins else {}))
        self.layers.append((own, fused.detach() if self.joins else fused, states.detach()))
        return fused

    # Adapters inside the layers

    def run(self, place, container, read):
        """Run the adapters of a place on the states that they read; return the update that is passed on, or None."""
        active = self.active and self.adapter(place, container, self.active)
        if active is None:
            return None
        own, fusion = active.update(read[active.reads]), self.at(place, "distillation_fusion", self.student)
        if not fusion:
            return own
        if not self.joins:
            read = {kind: states.detach() for kind, states in read.items()}
        teachers = {name: self.adapter(place, container, name) for name in self.teachers}
        updates = {name: teacher.update(read[teacher.reads]) for name, teacher in teachers.items() if teacher}
        # The update that is fused reads what the teachers read.
        fused = self.match(fusion, read[active.reads], own, updates)
        return fused if self.passes_fused else own

    def change_places(self):
        for name, module in list(self.plain.named_modules()):
            kind = type(module).__name__
            if kind == "BertOutput":
                module.forward = self.of_bert_output(name, module)
            if kind == "GPT2Block":
                self.change_gpt2_block(f"{name}.output_adapters", module)
            if isinstance(module, nn.Linear | Conv1D):
                module.forward = self.of_projection(name, module)
            if kind in LAYERS and self.at(name, "distillation_fusion", self.student):
                module.forward = self.of_layer(name, module)

    def of_projection(self, name, linear):
        project = linear.forward

        def forward(states):
            output = project(states)
            if self.active and self.configs[self.active].get("composition_mode") == "scale":
                factors = self.at(name, "loras", self.active)
                return output * factors["lora_B"].flatten() if factors else output
            update = self.run(name, "loras", {"output": states})
            return output if update is None else output + update

        return forward

    def of_bert_output(self, name, output):
        def forward(hidden_states, input_tensor):
            states = output.dense(hidden_states)
            read = {"output": output.LayerNorm(states + input_tensor), "input": input_tensor}
            update = self.run(name, "adapters", read)
            return output.LayerNorm(states + (0.0 if update is None else update) + input_tensor)

        return forward

    def change_gpt2_block(self, name, block):
        residual, mlp = [], block.mlp.forward
        block.ln_2.register_forward_pre_hook(lambda module, args: residual.append(args[0]))

        def forward(hidden_states):
            states, before = mlp(hidden_states), residual.pop()
            update = self.run(name, "adapters", {"output": states + before, "input": before})
            return states if update is None else states + update

        block.mlp.forward = forward

    # Whole layers

    def of_layer(self, name, layer):
        run, fusion = layer.forward, self.at(name, "distillation_fusion", self.student)
        inside = f"{self.prefix}{name}."
        held = [
            teacher
            for teacher in self.teachers
            if any(f".{teacher}." in key and key.startswith(inside) for key in self.parameters)
        ]

        def forward(states, *args, **kwargs):
            def output(adapter, states):
                self.active = adapter
                output = run(states, *args, **kwargs)
                self.active = self.student
                return output if isinstance(output, torch.Tensor) else output[0]

            passed_on, read = output(self.student, states), states if self.joins else states.detach()
            base = output(None, read)
            updates = {teacher: output(teacher, read) - base for teacher in held}
            fused = self.match(fusion, read, output(self.student, read) - base, updates)
            return (base + fused if self.passes_fused else passed_on,)

        return forward

    # Passes

    def one_pass(self, inputs, joins, passes_fused):
        """Run the model; return the logits, the task loss, and the layers."""
        self.layers, self.joins, self.passes_fused = [], joins, passes_fused
        labels = inputs["labels"]
        states = self.plain(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **self.without_cache
        ).last_hidden_state
        logits = states @ self.parameters["classifier.weight"].T + self.parameters["classifier.bias"]
        return logits, cross_entropy(logits.flatten(0, 1), labels.flatten()), self.layers

    @property
    def without_cache(self):
        return {"use_cache": False} if self.prefix == "transformer." else {}

    def forward(self, inputs):
        """The terms of a pass: logits, task loss, distillation loss, and the regularisation of the value matrices."""
        mask = inputs["attention_mask"].bool()
        if self.carrier == "dual":
            fused_logits, fused_loss, fused_layers = self.one_pass(inputs, joins=True, passes_fused=True)
            logits, loss, layers = self.one_pass(inputs, joins=True, passes_fused=False)
            layers = [(own, fused, read) for (own, _, read), (_, fused, _) in zip(layers, fused_layers, strict=True)]
            loss = loss + fused_loss
            differences = (logits - fused_logits.detach()).square().mean(dim=-1)
            between = [row[tokens].mean() for row, tokens in zip(differences, mask, strict=True) if tokens.any()]
            of_logits = sum(between) / len(mask)
        else:
            joins = self.carrier != "student"
            logits, loss, layers = self.one_pass(inputs, joins=joins, passes_fused=self.carrier == "fused")
            of_logits = 0.0
        losses = []
        for b, tokens in enumerate(mask):
            parts = [[part[b][tokens] for part in layer] for layer in layers]
            losses.append(sum(self.of_sequence(parts)) / len(parts) if tokens.any() else logits.new_zeros(()))
        values = [
            p
            for name, p in self.parameters.items()
            if name.endswith("value.weight") and ".distillation_fusion." in name
        ]
        regularization = sum((((value - torch.eye(len(value))) ** 2).sum() for value in values), logits.new_zeros(()))
        return Terms(logits, loss, sum(losses) / len(losses) + of_logits, regularization)

    @staticmethod
    def of_sequence(layers):
        """The losses of one sequence in each layer, from its tokens without padding, (n_tokens, hidden)."""

        def variance(states):
            return max(((states - states.mean()) ** 2).mean().item(), 0.0)

        inputs = [max(variance(states), MINIMAL_VARIANCE) for _, _, states in layers]
        powers = [max((own**2).mean().item(), (fused**2).mean().item()) for own, fused, _ in layers]
        ratio = sum(power / size for power, size in zip(powers, inputs, strict=True)) / len(layers)
        for (own, fused, _), size in zip(layers, inputs, strict=True):
            yield ((own - fused) ** 2).mean() / max(variance(fused), FLOOR * size * ratio, MINIMAL_VARIANCE)

"""One training forward pass of a distilled student, written from the equations of the docs; no code of the package.

A plain model of transformers runs with the student at its places, in float64. What the adapters and the fusions of the
model under test hold is read by the names of their parameters.
"""

import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

ACTIVATIONS = {"relu": relu, "gelu": gelu, "swish": silu}
MINIMAL_VARIANCE, FLOOR = 1e-6, 0.1


class Weights:
    """The parameters of one adapter at one place."""

    def __init__(self, parameters, config):
        self.parameters, self.config = parameters, config

    def update(self, states):
        """The update of the states, (batch, seq_len, hidden), that the adapter reads."""
        get = self.parameters.__getitem__
        if "lora_A" in self.parameters:
            return states @ get("lora_A").T @ get("lora_B").T * self.config["alpha"] / self.config["r"]
        features = ACTIVATIONS[self.config["non_linearity"]](
            states @ get("adapter_down.0.weight").T + get("adapter_down.0.bias")
        )
        return (features @ get("adapter_up.weight").T + get("adapter_up.bias")) * self.config["scaling"]


class Reference:
    """A plain copy of a model with a student, whose places are those of `carrier`.

    Args:
        model: The model under test.
        plain: A model of transformers without adapters, of the same config.
        configs: The configs of the adapters by their names, the student's last.
        carrier: "student", "fused", or "mixed" for the states of the student beside a match with the fused ones.
    """

    def __init__(self, model, plain, configs, carrier):
        self.parameters = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()
        }
        self.configs, self.carrier, self.layers, self.student = configs, carrier, [], list(configs)[-1]
        self.plain = plain.double().eval()
        self.plain.load_state_dict({name: self.parameters[name].detach() for name in self.plain.state_dict()})
        self.plain.requires_grad_(False)
        self.place_student()

    def at(self, place, container, name):
        """The parameters of an adapter, or of the fusion, at a place; empty where there is none."""
        prefix = f"{place}.{container}.{name}."
        return {key[len(prefix) :]: p for key, p in self.parameters.items() if key.startswith(prefix)}

    def run(self, place, container, states):
        """Run student and teachers on the states that they read; return the update that is passed on."""
        adapters = {}
        for name, config in self.configs.items():
            if parameters := self.at(place, container, name):
                adapters[name] = Weights(parameters, config)
        own = adapters.pop(self.student).update(states)
        fusion = self.at(place, "distillation_fusion", self.student)
        if not fusion:
            return own
        read = states.detach() if self.carrier == "student" else states
        updates = [adapter.update(read) for adapter in adapters.values()]
        if self.carrier != "student":
            updates.append(Weights(self.at(place, container, self.student), self.configs[self.student]).update(read))
        query = read @ fusion["query.weight"].T + fusion["query.bias"]
        scores = [(query * (update @ fusion["key.weight"].T)).sum(dim=-1) for update in updates]
        attention = torch.stack(scores, dim=-1).softmax(dim=-1)
        fused = sum(
            attention[..., n : n + 1] * (update @ fusion["value.weight"].T) for n, update in enumerate(updates)
        )
        self.layers.append((own, fused if self.carrier == "student" else fused.detach(), states.detach()))
        return fused if self.carrier == "fused" else own

    def place_student(self):
        for name, module in list(self.plain.named_modules()):
            if type(module).__name__ == "BertOutput":
                if self.at(name, "adapters", self.student):
                    module.forward = self.of_bert_output(name, module)
            elif type(module).__name__ == "GPT2Block":
                if self.at(f"{name}.output_adapters", "adapters", self.student):
                    self.change_gpt2_block(f"{name}.output_adapters", module)
            elif isinstance(module, nn.Linear) and self.at(name, "loras", self.student):
                module.forward = self.of_projection(name, module)

    def of_projection(self, name, linear):
        project = linear.forward
        return lambda states: project(states) + self.run(name, "loras", states)

    def of_bert_output(self, name, output):
        def forward(hidden_states, input_tensor):
            states = output.dense(hidden_states)
            update = self.run(name, "adapters", output.LayerNorm(states + input_tensor))
            return output.LayerNorm(states + update + input_tensor)

        return forward

    def change_gpt2_block(self, name, block):
        residual, mlp = [], block.mlp.forward
        block.ln_2.register_forward_pre_hook(lambda module, args: residual.append(args[0]))

        def forward(hidden_states):
            states = mlp(hidden_states)
            return states + self.run(name, "adapters", states + residual.pop())

        block.mlp.forward = forward

    def forward(self, inputs):
        """The last hidden states, the distillation loss and the regularisation of the value matrices."""
        self.layers.clear()
        output = self.plain(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()
        losses = []
        for b in range(len(mask)):
            layers = [[part[b][mask[b]] for part in layer] for layer in self.layers]
            losses.append(sum(self.of_sequence(layers)) / len(layers) if mask[b].any() else output.new_zeros(()))
        values = [
            p
            for name, p in self.parameters.items()
            if name.endswith("value.weight") and ".distillation_fusion." in name
        ]
        regularization = sum(((value - torch.eye(len(value))) ** 2).sum() for value in values)
        return output, sum(losses) / len(losses), regularization

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

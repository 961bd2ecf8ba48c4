"""Image classification: distil adapters of a vision transformer into one for new pictures.

python examples/by_feature/image_classification.py --demo
python examples/by_feature/image_classification.py --dataset_name uoft-cs/cifar10 --image_column img \
        --label_column label --eval_split test --teachers path/to/food101 path/to/svhn
"""

import os
from dataclasses import dataclass, field

import demo
import demo_data
import torch
from adapters import AdapterTrainer, AutoAdapterModel
from datasets import DatasetDict, load_dataset
from transformers import AutoImageProcessor, BaseImageProcessor, EvalPrediction, PreTrainedModel, default_data_collator

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "Base model of the teachers."}
    )
    dataset_name: str = field(default="AI-Lab-Makerere/beans", metadata={"help": "Hub id of a dataset of images."})
    image_column: str = field(default="image", metadata={"help": "The column with the image."})
    label_column: str = field(default="labels", metadata={"help": "The column with the class."})
    eval_split: str = field(default="validation", metadata={"help": "The split for evaluation."})
    teachers: list[str] = field(default_factory=list, metadata={"help": "Hub ids or folders of saved adapters."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)


def encode(data: DatasetDict, processor: BaseImageProcessor, args: Arguments) -> DatasetDict:
    """Turn images into pixel values whenever a batch is read, so that they are never all in memory."""
    demo.check_data(data, [args.image_column, args.label_column], [args.eval_split, "train"])

    def pixels(batch: dict[str, list]) -> dict[str, torch.Tensor | list]:
        images = processor([image.convert("RGB") for image in batch[args.image_column]], return_tensors="pt")
        return {"pixel_values": images["pixel_values"], "labels": batch[args.label_column]}

    return data.with_transform(pixels)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, and name them in `args`."""
    tasks, args.eval_split = demo_data.pictures(args.image_column, args.label_column), "validation"
    args.model_name_or_path = demo.save_vision_encoder(tasks.pop("pretraining")["train"], folder)
    *siblings, own = tasks
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)

    def add_head(model: PreTrainedModel, name: str) -> None:
        model.add_image_classification_head(name, num_labels=4)

    for name in siblings:
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        dataset = encode(tasks[name], processor, args)["train"]
        args.teachers.append(
            demo.train_teacher(model, name, dataset, default_data_collator, folder, add_head=add_head)
        )
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        # The transform needs the columns of the images, which Trainer would remove.
        args, training_args = demo.parse(
            Arguments, output_dir="outputs/image_classification", remove_unused_columns=False
        )
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name)
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
        encoded = encode(data, processor, args)
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        model.add_adapter(demo.STUDENT, config="seq_bn", distill_from=args.teachers)
        num_labels = data["train"].features[args.label_column].num_classes
        model.add_image_classification_head(demo.STUDENT, num_labels=num_labels)
        model.train_adapter(demo.STUDENT)

    shared = {
        "eval_dataset": encoded[args.eval_split],
        "data_collator": default_data_collator,
        "compute_metrics": accuracy,
    }
    trainer = had.DistillationTrainer(model, training_args, train_dataset=encoded["train"], **shared)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_adapter(f"{folder}/{demo.STUDENT}", demo.STUDENT)

    stock = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = AdapterTrainer(stock, training_args, **shared).evaluate()["eval_accuracy"]
    print(f"accuracy before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

"""``fedbe pretrain``: the small base model."""

from collections.abc import Sequence

from fedbe.cli.options import command_parser, parse
from fedbe.pretraining.pretrain import PretrainConfig, pretrain


def run(arguments: Sequence[str]) -> None:
    """Train the small base model that comes with fedbe."""
    parser = command_parser("pretrain")
    parser.add_argument("--config", action="config", help="A YAML file with the options below.")
    parser.add_class_arguments(PretrainConfig)
    values = parser.instantiate(parse(parser, arguments)).as_dict()
    values.pop("config")
    print(pretrain(PretrainConfig(**values)))

"""What the core itself registers, by the same hook as any plugin."""

from __future__ import annotations

from .hookspecs import hookimpl
from .registry import Registrar


@hookimpl
def kdcore_register(registry: Registrar) -> None:
    losses = "kdcore.losses"
    registry.loss("cross_entropy", f"{losses}.terms:CrossEntropy", options=f"{losses}.options:CrossEntropyOptions",
                  about="labels, with label smoothing")  # fmt: skip
    registry.loss("kd", f"{losses}.terms:KD", options=f"{losses}.options:KDOptions",
                  about="Hinton's KD, with class or instance normalisation")  # fmt: skip
    registry.loss("dkd", f"{losses}.terms:DKD", options=f"{losses}.options:DKDOptions",
                  about="decoupled KD, with class or instance normalisation")  # fmt: skip

    sets = "kdcore.data"
    registry.dataset("digits", f"{sets}.sets:digits", options=f"{sets}.options:DigitsOptions",
                     about="scikit-learn's 1,797 real 8x8 digits, embedded")  # fmt: skip
    registry.dataset("synthetic", f"{sets}.sets:synthetic", options=f"{sets}.options:SyntheticOptions",
                     about="random class prototypes and noise of any size")  # fmt: skip
    for name, about in (("mnist", "28x28 grey digits"), ("cifar10", "32x32 RGB"), ("cifar100", "32x32 RGB"),
                        ("svhn", "32x32 RGB house numbers")):  # fmt: skip
        registry.dataset(name, f"{sets}.sets:{name}", options=f"{sets}.options:TorchvisionOptions",
                         about=f"torchvision's {name}, {about}; needs root")  # fmt: skip
    registry.dataset("imagefolder", f"{sets}.folder:imagefolder", options=f"{sets}.options:ImageFolderOptions",
                     about="a folder of images by class, read when wanted, such as ImageNet; needs root")  # fmt: skip
    registry.source("epochs", f"{sets}.source:EpochSource", options="kdcore.options:Options",
                    about="the training split, shuffled every epoch")  # fmt: skip
    registry.transform("shift", f"{sets}.augment:Shift", options=f"{sets}.options:ShiftOptions",
                       about="random translation by at most n pixels, zeros outside (pad-and-crop)")  # fmt: skip
    registry.transform("flip", f"{sets}.augment:Flip", options="kdcore.options:Options",
                       about="random horizontal flip")  # fmt: skip
    registry.transform("cutout", f"{sets}.augment:Cutout", options=f"{sets}.options:CutoutOptions",
                       about="a square of the mean colour at a random place")  # fmt: skip
    registry.transform("mixup", f"{sets}.mix:MixUp", options=f"{sets}.options:MixUpOptions",
                       about="weighted means of two samples and of their labels")  # fmt: skip
    registry.transform("cutmix", f"{sets}.mix:CutMix", options=f"{sets}.options:CutMixOptions",
                       about="a box of another sample, labels by the pixels")  # fmt: skip
    registry.transform("views", f"{sets}.mix:Views", options=f"{sets}.options:ViewsOptions",
                       about="two copies of the batch, one augmented weakly, one strongly")  # fmt: skip

    training = "kdcore.training"
    registry.step("distill", f"{training}.step:Distill", options="kdcore.options:Options",
                  about="every live member once, one update each")  # fmt: skip
    for name in ("constant", "cosine", "step"):
        registry.schedule(name, f"{training}.schedules:{name}", options=f"{training}.options:{name.title()}Options")
    registry.optimizer("sgd", f"{training}.optimizers:sgd", options=f"{training}.options:SGDOptions")
    registry.optimizer("adamw", f"{training}.optimizers:adamw", options=f"{training}.options:AdamWOptions")
    registry.optimizer("lars", f"{training}.optimizers:LARS", options=f"{training}.options:LARSOptions",
                       about="layer-wise rates for large batches, on SGD with momentum")  # fmt: skip
    registry.optimizer("lamb", f"{training}.optimizers:LAMB", options=f"{training}.options:LAMBOptions",
                       about="layer-wise rates for large batches, on Adam")  # fmt: skip
    for name, about in (("subset", "some of a teacher's classes"), ("groups", "a teacher's classes, summed in groups")):
        registry.label_map(name, "kdcore.label_maps:listed", options=f"kdcore.label_maps:{name.title()}Options",
                           about=about)  # fmt: skip
    registry.metric("kl", f"{training}.metrics:kl", about="KL(teacher || student) at temperature 1")
    registry.failure_policy("stop", "kdcore.failure:StopPolicy", options="kdcore.options:Options",
                            about="the run ends when a stage runs out of memory")  # fmt: skip
    registry.failure_policy("retry", "kdcore.failure:RetryPolicy", options="kdcore.options:Options",
                            about="goes on from the last checkpoint with batches in twice as many pieces")  # fmt: skip
    registry.executor("local", "kdcore.executor:LocalExecutor", about="this process, or --jobs n worker processes")

    deploy = "kdcore.deploy"
    registry.exporter("safetensors", f"{deploy}.exporters:SafetensorsExporter", options="kdcore.options:Options",
                      about="weights and card, for recipes and kdcore.load_model")  # fmt: skip
    registry.exporter("torch-export", f"{deploy}.exporters:TorchExporter", options="kdcore.options:Options",
                      about="a program of torch.export, .pt2")  # fmt: skip
    registry.exporter("onnx", f"{deploy}.exporters:OnnxExporter", options=f"{deploy}.options:OnnxOptions",
                      about="ONNX, checked with onnxruntime; needs the extra onnx")  # fmt: skip

import pytest
import torch

from adabatch.models import get_model, model_name

@pytest.mark.parametrize("name, classes, count", [
    ("alexnet", 10, 2_472_266),
    ("alexnet", 100, 2_495_396),
    ("vgg19bn", 10, 20_040_522),
    ("vgg19bn", 100, 20_086_692),
    ("resnet20", 10, 272_474),
    ("resnet20", 100, 278_324),
    ("alexnet_imagenet", 1000, 61_100_840),
    ("resnet50", 1000, 25_557_032),
])
def test_parameter_counts(name, classes, count):
    assert sum(p.numel() for p in get_model(name, classes).parameters()) == count

@pytest.mark.parametrize("name", ["alexnet", "resnet20", "vgg19_bn"])
def test_forward_and_seeding(name):
    torch.manual_seed(3)
    a = get_model(name, 10)
    torch.manual_seed(3)
    b = get_model(name, 10)
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(a(x), b(x)) and a(x).shape == (4, 10)

def test_initialisation_is_he_normal():
    for name in ("resnet20", "vgg19bn"):
        for m in get_model(name).modules():
            if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 5000:
                fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
                assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)

def test_spellings():
    assert model_name("VGG19_BN") == "vgg19bn" and model_name("resnet20") == "resnet20"
    with pytest.raises(ValueError, match="unknown model 'vgg'"): get_model("vgg")
    with pytest.raises(ValueError, match="num_classes must be a positive integer, not 0"):
        get_model("alexnet", 0)

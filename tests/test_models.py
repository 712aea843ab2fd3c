import pytest
import torch

from adabatch.models import get_model

def test_imagenets_networks_have_the_known_numbers_of_parameters():  # of the others, nbs/05_models.ipynb asks
    for name, count in (("alexnet_imagenet", 61_100_840), ("resnet50", 25_557_032)):
        assert sum(p.numel() for p in get_model(name, 1000).parameters()) == count

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

"""The federated methods by name: what a client does in a round."""

from raysim.methods.call import Method
from raysim.methods.dplora import dplora
from raysim.methods.fedit import fedit
from raysim.methods.fedmit import fedmit
from raysim.methods.fedpit import fedpit
from raysim.methods.fewfedweight import fewfedweight
from raysim.methods.locit import locit, locit_synthetic
from raysim.methods.scaffold import scaffold

METHODS: dict[str, Method] = {
    "fedit": fedit,
    "scaffold": scaffold,
    "fedpit": fedpit,
    "fedmit": fedmit,
    "fewfedweight": fewfedweight,
    "dplora": dplora,
    "locit": locit,
    "locit_synthetic": locit_synthetic,
    "cenit": fedit,
}

"""The federated methods by name: what a client does in a round."""

from raysim.methods.call import Method
from raysim.methods.dplora import dplora
from raysim.methods.fedit import fedit
from raysim.methods.fedpit import fedpit
from raysim.methods.locit import locit

METHODS: dict[str, Method] = {"fedit": fedit, "fedpit": fedpit, "dplora": dplora, "locit": locit, "cenit": fedit}

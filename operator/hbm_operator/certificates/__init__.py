"""The webhook's certificate where the operator makes its own (mode self-signed).

`issue` makes a pair, `rotation` decides purely what is to be done next, `keeper` does it.
"""

from hbm_operator.certificates.issue import Pair, issue
from hbm_operator.certificates.keeper import CertificateKeeper, KeeperSettings

__all__ = ["CertificateKeeper", "KeeperSettings", "Pair", "issue"]

"""A real Kubernetes on one Linux machine, for the tests of this project.

`Toolchain` builds the parts from pinned Go modules, `ApiServer` runs etcd and kube-apiserver alone
(no root needed), `Cluster` runs three nodes in namespaces of their own. Needs only the standard
library, so that `python3.11 -m hbm_e2e build` works before any environment exists.
"""

"""The custom resources as pydantic models; `crds/` is made from them (`models.crd`)."""

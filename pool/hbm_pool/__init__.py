"""One arena of HBM for two caches. `import hbm_pool` never imports torch."""

module hbm-partition/e2e/pause

go 1.25.0

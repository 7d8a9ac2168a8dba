from hbm_e2e.cli import main

main()

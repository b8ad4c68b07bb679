"""`python -m mithridate`: the command line where no script was installed."""

from mithridate.cli.app import main

main()

"""`python -m cacheflow.service`: the supervised engine process. For one of your own there is `cacheflow engine`."""

from cacheflow.service.process import main

main()

"""`python -m safer_ray` is `safer-ray`; jobs on a cluster start this way."""

from safer_ray.cli.app import main

if __name__ == "__main__":
    main()

"""Operations that are worth more than one implementation, a folder each: `api`, `reference`, and faster or leaner ones.

`api` picks the best implementation available and always works; every one is held against `reference` by the tests.
`arg_specs` names shapes of real models and `bench` compiles an implementation for one of them, to be timed. `pallas/`
holds the kernels of all operations, and only it imports pallas.
"""

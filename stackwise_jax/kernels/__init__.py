"""Operations that are worth more than one implementation, a folder each: `api`, `reference`, and faster or leaner ones.

`implementation=None` picks the best one available and always works; every one is held against `reference` by the tests.
"""

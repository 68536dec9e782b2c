"""Small files of WordNet's form."""

LICENCE = '  1 This software and database is being provided to you, the LICENSEE, by\n'


def noun(offset, words, pointers=()):
  ends = ''.join(f' {symbol} {target} n 0000' for symbol, target in pointers)
  names = ' '.join(f'{word} 0' for word in words)
  return f'{offset} 03 n {len(words):02x} {names} {len(pointers):03}{ends} | a gloss @ 00000001 n 0000\n'


def write_wordnet(folder, classes=()):
  """entity > garment > shirt, shoe; the classes are kinds of garment or of shoe, in turn."""
  folder.mkdir(parents=True, exist_ok=True)
  synsets = [('entity', ()), ('garment', ('entity',)), ('shoe', ('entity',)), ('Emil', ('garment',))]
  synsets += [(name, (('garment', 'shoe')[i % 2],)) for i, name in enumerate(classes)]
  offsets = {name: f'{100 * i + 1740:08}' for i, (name, _) in enumerate(synsets)}
  lines = [
    noun(offsets[n], [n, f'{n}_too'], [('@i' if n == 'Emil' else '@', offsets[o]) for o in over] + [('~', '00001740')])
    for n, over in synsets
  ]
  (folder / 'data.noun').write_text(LICENCE + ''.join(lines))
  # Four senses of each noun, the same.
  index = [f'{n} n 4 2 @ ~ 4 0 {" ".join([offsets[n]] * 4)}  \n' for n in offsets]
  (folder / 'index.noun').write_text(LICENCE + ''.join(index))
  return str(folder)

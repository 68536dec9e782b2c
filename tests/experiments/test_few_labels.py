"""The protocol of few labels: what it keeps, and the table that it makes."""

import pytest

from kronmesh.train.errors import ConfigError
from kronmesh.train.runtime.workdir import check_config
from scripts import few_labels
from scripts.few_labels import Settings
from tests.data.idx import write_idx


def arms(classical, gan, cas):
  found = {'none': {'accuracy': 0.5}, 'classical': {'accuracy': classical}}
  return {**found, **{arm: {'accuracy': gan, 'CAS': cas} for arm in few_labels.ARMS[2:]}}


def test_the_table_has_means_and_intervals_of_differences_within_a_seed():
  found = {(100, 0): arms(0.60, 0.65, 0.4), (100, 1): arms(0.70, 0.77, 0.6), (500, 0): arms(0.9, 0.9, 0.9)}
  text = few_labels.table(found)
  assert len(text.splitlines()) == 2 + 4, 'one seed says nothing of 500 labels'
  # Student's t of one degree of freedom at 97.5 % is 12.706; the standard errors are 0.05, 0.01 and 0.1.
  assert '65.0 +- 63.5' in text and '6.0 +- 12.7' in text and '50.0 +- 127.1' in text


def test_what_was_measured_is_kept_for_the_next_call_of_the_same_settings(tmp_path):
  path, settings = tmp_path / 'out/augmentation.jsonl', Settings(200, 500)
  assert few_labels.read(path, settings) == {}
  few_labels.add(path, settings, 500, 1, arms(0.7, 0.8, 0.5))
  few_labels.add(path, settings, 100, 0, arms(0.6, 0.6, 0.4))
  found = few_labels.read(path, settings)
  assert found == {(100, 0): arms(0.6, 0.6, 0.4), (500, 1): arms(0.7, 0.8, 0.5)}
  with pytest.raises(ConfigError, match=r"holds what was measured with {'steps': 200, .+, not {'steps': 300, .+ --out"):
    few_labels.read(path, Settings(300, 500))


def test_arms_differ_in_nothing_but_their_images():
  configs = {arm: few_labels.classifier(100, 3, arm, Settings(200, 500)).to_dict() for arm in few_labels.ARMS}
  assert configs['classical'].pop('data') != configs['none'].pop('data')
  assert configs['classical'] == configs['none']
  gans = [few_labels.gan(100, 3, policy, Settings(200, 500)).to_dict() for policy in ((), few_labels.POLICY)]
  assert [g['gan'].pop('augment') for g in gans] == [(), few_labels.POLICY] and gans[0] == gans[1]
  assert gans[0]['data']['train_examples'] == 100 and gans[0]['seed'] == 3, "the classifiers' images"


def test_a_finished_run_of_another_config_is_not_taken(tmp_path):
  settings = Settings(200, 500)
  (tmp_path / 'export').mkdir()
  check_config(few_labels.classifier(100, 3, 'none', settings), tmp_path)
  with pytest.raises(ConfigError, match=r'holds a run with another .*data\.augment'):
    few_labels.trained(few_labels.classifier(100, 3, 'classical', settings), tmp_path)


def with_adam(config):
  config.optimizer = 'adam'
  config.model.width = 4
  return config


@pytest.mark.long
def test_all_arms_train_and_go_on(tmp_path, monkeypatch):
  write_idx(tmp_path / 'idx', True, train=200, test=100)
  monkeypatch.setenv('KRONMESH_DATA', str(tmp_path / 'data'))
  # Images are what is looked at: a plain optimiser compiles in a fraction of the time.
  kept = few_labels.classifier
  monkeypatch.setattr(few_labels, 'classifier', lambda *args: with_adam(kept(*args)))
  settings = Settings(2, 2, str(tmp_path / 'idx'))
  found = few_labels.run(100, 0, tmp_path / 'runs', settings)
  assert all(0 <= value <= 1 for own in found.values() for value in own.values())
  assert [sorted(found[arm]) for arm in few_labels.ARMS] == 2 * [['accuracy']] + 2 * [['CAS', 'accuracy']]
  monkeypatch.setattr(few_labels, 'train', None)
  assert few_labels.run(100, 0, tmp_path / 'runs', settings) == found

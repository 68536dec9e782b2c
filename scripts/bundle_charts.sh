#!/usr/bin/env bash
# Makes the chart library of the pages: src/train/reporting/pages/echarts.js.
#
#   scripts/bundle_charts.sh
#
# It bundles the parts of Apache ECharts that the pages use into one minified file, under the licenses of ECharts and of
# the libraries inside it. It needs npm and its registry. The versions below are pinned, so the same file comes out
# each time; to take another version, change them here and run the browser tests of tests/experiments/test_pages.py.
set -euo pipefail
ECHARTS=6.1.0
ESBUILD=0.28.2
cd "$(dirname "$0")/.."
out=$PWD/src/train/reporting/pages/echarts.js
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm init --yes > npm.log
npm install --no-audit --no-fund --ignore-scripts "echarts@$ECHARTS" "esbuild@$ESBUILD" >> npm.log 2>&1 || {
  cat npm.log >&2
  exit 1
}
cat > entry.js << 'END'
export { init } from 'echarts/core';
import { use } from 'echarts/core';
import { HeatmapChart, LineChart, ParallelChart, ScatterChart } from 'echarts/charts';
import {
  AriaComponent, DataZoomInsideComponent, GridComponent, LegendScrollComponent, MarkLineComponent, ParallelComponent,
  TitleComponent, TooltipComponent, VisualMapContinuousComponent,
} from 'echarts/components';
import { SVGRenderer } from 'echarts/renderers';
use([
  HeatmapChart, LineChart, ParallelChart, ScatterChart, AriaComponent, DataZoomInsideComponent, GridComponent,
  LegendScrollComponent, MarkLineComponent, ParallelComponent, TitleComponent, TooltipComponent,
  VisualMapContinuousComponent, SVGRenderer,
]);
END
node_modules/@esbuild/*/bin/esbuild entry.js --bundle --minify --format=iife --global-name=echarts --target=es2018 \
  --define:process.env.NODE_ENV='"production"' --drop:console --legal-comments=none --log-level=warning --outfile=echarts.js
license() { # prints a license file, with nothing that would end the comment around it
  sed 's|\*/|* /|g' "node_modules/$1"
}
{
  echo "/*! Apache ECharts $ECHARTS, the parts that the pages use, bundled by scripts/bundle_charts.sh."
  echo "Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0"
  license echarts/NOTICE
  echo
  echo "It contains zrender, tslib (0BSD, Copyright (c) Microsoft Corporation) and code of d3.js, under these licenses:"
  license zrender/LICENSE
  license echarts/licenses/LICENSE-d3
  echo '*/'
  cat echarts.js
} > "$out"
echo "$out: $(wc -c < "$out") bytes"

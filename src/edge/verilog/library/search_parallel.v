// Finds the levels of sums, one each cycle, by the same tree as `search`, with a register after each of its BITS steps.
module search_parallel #(
  parameter SUM = 9,
  parameter BITS = 4,
  parameter [SUM*(2**BITS)-1:0] THRESHOLDS = 0
) (
  input wire clk,
  input wire [SUM-1:0] sum,
  output wire [BITS-1:0] level  // of the sum that came BITS edges ago
);
  genvar i, j;
  generate
    for (i = 0; i < BITS; i = i + 1) begin : step
      wire [SUM-1:0] incoming, threshold;
      reg [SUM-1:0] unused_if_last;  // the sum, for the next step
      reg [i:0] found;  // the i + 1 highest bits of the level
      for (j = 0; j < SUM; j = j + 1) begin : column
        // The nodes of this step are 2^i ... 2^(i + 1) - 1, in the order of the bits that were found.
        localparam [2**i-1:0] TABLE = THRESHOLDS[(2**BITS)*j + 2**i +: 2**i];
        if (i == 0) begin : only
          assign threshold[j] = TABLE;
        end else begin : one_of_many
          assign threshold[j] = TABLE[step[i-1].found];
        end
      end
      // A threshold may be zero, which every sum reaches.
      /* verilator lint_off UNSIGNED */
      wire upper = incoming >= threshold;
      /* verilator lint_on UNSIGNED */
      if (i == 0) begin : first
        assign incoming = sum;
        always @(posedge clk) found <= upper;
      end else begin : later
        assign incoming = step[i-1].unused_if_last;
        always @(posedge clk) found <= {step[i-1].found, upper};
      end
      always @(posedge clk) unused_if_last <= incoming;
    end
  endgenerate
  assign level = step[BITS-1].found;
endmodule

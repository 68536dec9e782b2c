// A queue in memory, between two layers. Its output is registered, and so is `room`, which says that at least SPARE more
// values fit. The layer before it stops in time by `room`, so its arithmetic never has to wait.
module fifo #(
  parameter WIDTH = 8,
  parameter DEPTH = 64,  // a power of two
  parameter SPARE = 16
) (
  input wire clk,
  input wire rst,
  input wire [WIDTH-1:0] in_data,
  input wire in_valid,
  output reg room,
  output reg [WIDTH-1:0] out_data,
  output reg out_valid,
  input wire out_ready
);
  localparam BITS = $clog2(DEPTH);
  reg [WIDTH-1:0] memory [0:DEPTH-1];
  reg [BITS-1:0] writing, reading;
  reg [BITS:0] held;  // values in memory, without the one in out_data
  wire take = (~out_valid | out_ready) & (held != 0);

  always @(posedge clk) begin
    if (in_valid) memory[writing] <= in_data;
    if (take) out_data <= memory[reading];
    if (rst) begin
      writing <= 0;
      reading <= 0;
      held <= 0;
      out_valid <= 1'b0;
      room <= 1'b0;
    end else begin
      if (in_valid) writing <= writing + 1'b1;
      if (take) reading <= reading + 1'b1;
      held <= held + {{BITS{1'b0}}, in_valid} - {{BITS{1'b0}}, take};
      out_valid <= take | (out_valid & ~out_ready);
      room <= held <= DEPTH - SPARE;
    end
  end
endmodule

// What is placed and routed: the network, with a result sent out WAY bits a cycle, so that it fits the pins of any package.
module board #(
  parameter IN = 4,
  parameter OUT = 180,
  parameter WAY = 8
) (
  input wire clk,
  input wire rst,
  input wire [IN-1:0] in_data,
  input wire in_valid,
  output wire in_ready,
  output wire [WAY-1:0] out_data,
  output wire out_valid
);
  localparam STEPS = (OUT + WAY - 1) / WAY;
  localparam SB = $clog2(STEPS + 1);
  wire [OUT-1:0] result;
  wire ready;
  reg [STEPS*WAY-1:0] left;
  reg [SB-1:0] steps;
  // The reset comes from a pin, far from most of the logic.
  reg reset;
  always @(posedge clk) reset <= rst;
  wire take = steps == 0 & ready;
  network network (
    .clk(clk), .rst(reset), .in_data(in_data), .in_valid(in_valid), .in_ready(in_ready),
    .out_data(result), .out_valid(ready), .out_ready(steps == 0));
  always @(posedge clk) begin
    if (take) left[OUT-1:0] <= result;
    else left <= left >> WAY;
    if (reset) steps <= 0;
    else if (take) steps <= STEPS[SB-1:0];
    else if (steps != 0) steps <= steps - 1'b1;
  end
  assign out_data = left[WAY-1:0];
  assign out_valid = steps != 0;
endmodule

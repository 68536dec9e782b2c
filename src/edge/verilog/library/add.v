// Adds an earlier stream to a layer's result: clip(result + earlier), for WIDTH channels. A result has BITS + 1 bits and
// stands for result - 2^BITS; `earlier` and the sum have BITS bits. The earlier pixel is there when the result comes,
// because the result was computed from it.
module add #(
  parameter WIDTH = 1,
  parameter BITS = 4
) (
  input wire clk,
  input wire rst,
  input wire [WIDTH*(BITS+1)-1:0] in_data,
  input wire in_valid,
  input wire [WIDTH*BITS-1:0] earlier,
  output wire take,
  output reg [WIDTH*BITS-1:0] out_data,
  output reg out_valid
);
  assign take = in_valid;
  genvar i;
  generate
    for (i = 0; i < WIDTH; i = i + 1) begin : channel
      // result + earlier, which stands for that less 2^BITS: below it is negative, from twice it on too large.
      wire [BITS+1:0] sum = {1'b0, in_data[(BITS+1)*i +: BITS+1]} + {2'b00, earlier[BITS*i +: BITS]};
      always @(posedge clk)
        out_data[BITS*i +: BITS] <= sum[BITS+1] ? {BITS{1'b1}} : sum[BITS] ? sum[BITS-1:0] : {BITS{1'b0}};
    end
  endgenerate
  always @(posedge clk) out_valid <= ~rst & in_valid;
endmodule
